import colorsys
import dataclasses
import itertools

import numpy as np
import pytest

from paligemma_jax.shapes_world.scenes import COLORS, SHAPES, draw, masks, sample_color, scene_at, unit_mask
from paligemma_jax.tasks.overlap import mask_iou
from paligemma_jax.tasks.segmentation import crop_mask, paste_mask


def test_a_seed_and_an_index_stand_for_one_picture():
    first, again, other = (draw(scene_at(seed, 3)) for seed in (7, 7, 8))
    assert first.tobytes() == again.tobytes() and first.size == again.size and first.mode == "RGB"
    assert first.tobytes() != other.tobytes()


def test_pictures_are_at_most_twice_as_long_as_wide(scenes):
    for scene in scenes:
        width, height = scene.size
        assert max(scene.size) <= 2 * min(scene.size) + 1 and max(scene.size) <= 240
        assert draw(scene).size == (width, height)
    assert {1} < {np.sign(scene.size[0] - scene.size[1]) for scene in scenes}


def test_there_are_one_to_four_shapes_of_all_kinds(scenes):
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3, 4}
    assert {shape.kind for scene in scenes for shape in scene.shapes} == set(itertools.product(COLORS, SHAPES))
    assert len(scene_at(0, 0, num_objects=3).shapes) == 3


def test_shapes_lie_inside_and_have_the_promised_size(scenes):
    for scene in scenes:
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            assert min(x0, y0) >= 0 and x1 <= scene.size[0] and y1 <= scene.size[1]
            assert 1 / 8 <= max(x1 - x0, y1 - y0) / min(scene.size) <= 1 / 2


def test_shapes_do_not_touch(scenes):
    for scene in scenes:
        assert masks(scene).sum(axis=0).max() == 1
        for a, b in itertools.combinations([shape.box for shape in scene.shapes], 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) > 1


def test_shapes_stand_out_from_the_background(scenes):
    for scene in scenes:
        for shape in scene.shapes:
            distance = np.linalg.norm(scene.background.astype(float) - shape.rgb, axis=-1)
            assert distance.min() >= 60


def test_boxes_are_the_extents_of_the_masks(scenes):
    for scene in scenes:
        for shape, mask in zip(scene.shapes, masks(scene), strict=True):
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            extent = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            # The tips of a star and a triangle are thinner than a pixel.
            np.testing.assert_allclose(extent, shape.box, atol=1 if shape.shape in ("circle", "square") else 2.5)


def test_the_picture_shows_what_the_masks_say(scenes):
    for scene in scenes[:60]:
        pixels = np.asarray(draw(scene), float)
        for shape, mask in zip(scene.shapes, masks(scene), strict=True):
            if mask.sum() > 400:  # blur and texture reach all of a very small one
                assert np.abs(np.median(pixels[mask], axis=0) - shape.rgb).max() < 20


def test_a_mask_in_its_own_box_is_the_same_mask(scenes):
    """What the mask VQ-VAE learns to write is what `paste_mask` reads, and what `crop_mask` would give it."""
    agreement = []
    for scene in scenes[:40]:
        for shape, mask in zip(scene.shapes, masks(scene), strict=True):
            square = unit_mask(shape)
            agreement.append(mask_iou(paste_mask(2 * square - 1, shape.box, scene.size), mask))
            assert np.abs(crop_mask(mask, shape.box) - square).mean() < 0.15
    assert min(agreement) > 0.8 and np.mean(agreement) > 0.95


def test_colour_names_do_not_overlap():
    rng = np.random.default_rng(0)
    hues = {}
    for color in COLORS:
        hsv = np.array([colorsys.rgb_to_hsv(*np.array(sample_color(color, rng)) / 255) for _ in range(300)])
        assert hsv[:, 1].min() > 0.4 and hsv[:, 2].min() > 0.37  # neither grey nor black
        hue = (hsv[:, 0] * 360 + 30) % 360 - 30  # red lies around 0
        hues[color] = hue.min(), hue.max()
    ordered = sorted(hues, key=hues.get)
    assert ordered == ["red", "orange", "yellow", "green", "blue", "purple"]
    gaps = [hues[b][0] - hues[a][1] for a, b in itertools.pairwise(ordered)]
    assert min(gaps) > 6


def test_style_changes_the_picture_and_not_the_labels(scenes):
    scene = next(scene for scene in scenes if scene.texture)
    other = dataclasses.replace(scene, style_seed=scene.style_seed + 1)
    assert draw(scene).tobytes() != draw(other).tobytes()
    np.testing.assert_array_equal(masks(scene), masks(other))


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_masks_fill_their_square(shape, scenes):
    found = next(item for scene in scenes for item in scene.shapes if item.shape == shape)
    mask = unit_mask(found, side=32)
    assert mask.shape == (32, 32) and (mask.min() == 0 or shape == "square")
    for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert edge.max() > 0.1
