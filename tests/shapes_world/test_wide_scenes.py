"""The wider world of the first drawing program."""

import itertools
import math

import numpy as np
import pytest

from paligemma_jax.shapes_world import backdrops
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES, Proportions, draw, masks, outline_mask, polygon, rotated
from paligemma_jax.shapes_world.wide_scenes import contrast, rotated_masks, wide_scene_at
from paligemma_jax.tasks.overlap import mask_iou


@pytest.fixture(scope="module")
def wide():
    return [wide_scene_at(0, index, max_side=240) for index in range(120)]


def test_a_seed_and_an_index_stand_for_one_picture():
    first, again, other = (draw(wide_scene_at(seed, 3, max_side=200)) for seed in (7, 7, 8))
    assert first.tobytes() == again.tobytes() and first.mode == "RGB"
    assert first.tobytes() != other.tobytes()


def test_there_are_none_to_five_shapes_of_all_kinds(wide):
    counts = np.bincount([len(scene.shapes) for scene in wide], minlength=6)
    assert len(counts) == 6 and counts.min() > 3
    assert {shape.kind for scene in wide for shape in scene.shapes} == set(itertools.product(COLORS, SHAPES))
    assert len(wide_scene_at(0, 0, num_objects=2, max_side=120).shapes) == 2
    assert wide_scene_at(0, 0, num_objects=0, max_side=120).shapes == ()


def test_an_empty_scene_has_no_masks():
    scene = wide_scene_at(1, 0, num_objects=0, max_side=130)
    assert masks(scene).shape == (0, *scene.size[::-1]) and draw(scene).size == scene.size


def test_shapes_lie_inside_apart_and_have_the_promised_size(wide):
    for scene in wide:
        width, height = scene.size
        assert max(scene.size) <= 4 / 3 * min(scene.size) + 1
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            assert min(x0, y0) >= 0 and x1 <= width and y1 <= height
            assert 1 / 8 <= max(x1 - x0, y1 - y0) / min(scene.size) <= 1 / 2
        for a, b in itertools.combinations([shape.box for shape in scene.shapes], 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) > 1


def test_boxes_are_the_extents_of_the_masks(wide):
    for scene in wide[:60]:
        for shape, mask in zip(scene.shapes, masks(scene), strict=True):
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            extent = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            np.testing.assert_allclose(extent, shape.box, atol=3.5)  # sharp tips are thinner than a pixel


def test_masks_cover_the_area_of_the_outline(wide):
    for scene in wide[:60]:
        for shape, mask in zip(scene.shapes, masks(scene), strict=True):
            x, y = shape.outline.T
            area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
            rim = np.linalg.norm(shape.outline - np.roll(shape.outline, -1, axis=0), axis=1).sum()
            assert mask.sum() == pytest.approx(area, abs=0.25 * rim)  # a quarter of a pixel on either side of the edge


def test_all_rotations_occur(wide):
    first_edges = {"square": 90.0, "triangle": 360.0}
    for name, period in first_edges.items():
        edges = [s.outline[1] - s.outline[0] for scene in wide for s in scene.shapes if s.shape == name]
        angles = [math.degrees(math.atan2(y, x)) % period for x, y in edges]
        assert np.histogram(angles, 6, (0, period))[0].min() >= 3


def diagonals(shape, size):
    """Of a shape of four corners as a square picture shows it: the greater by the smaller."""
    corners = shape.outline / size
    lengths = np.linalg.norm(corners[:2] - corners[2:], axis=1)
    return lengths.max() / lengths.min()


def test_no_turned_square_is_a_diamond(wide):
    """Neither as it is drawn nor stretched to a square, as models see it."""
    seen = {name: [(s, scene.size) for scene in wide for s in scene.shapes if s.shape == name] for name in SHAPES}
    assert min(diagonals(shape, (1, 1)) for shape, _ in seen["diamond"]) >= 1.4
    assert max(diagonals(shape, (1, 1)) for shape, _ in seen["square"]) == pytest.approx(1)
    assert max(diagonals(*each) for each in seen["square"]) <= 4 / 3 + 0.02
    sides = [np.linalg.norm(np.diff(s.outline[:3], axis=0), axis=1) for s, _ in seen["diamond"]]
    np.testing.assert_allclose([a / b for a, b in sides], 1)  # a rhombus


@pytest.mark.parametrize("first, second", list(itertools.combinations(SHAPES, 2)))
def test_shapes_can_be_told_apart_at_any_rotation(first, second):
    """The most alike of both, of equal area around one centre, differ in more than a tenth of what they cover."""
    rng = np.random.default_rng(0)
    alike = Proportions(triangle=(1.732, 1.7321), diamond=(0.666, 0.667), star=(0.49, 0.5))

    def mask(shape, degrees):
        corners = rotated(polygon(shape, rng, alike), degrees)
        x, y = corners.T
        cross = x * np.roll(y, -1) - y * np.roll(x, -1)
        area = cross.sum() / 2
        centre = ((corners + np.roll(corners, -1, axis=0)) * cross[:, None]).sum(axis=0) / (6 * area)
        corners = (corners - centre) / math.sqrt(abs(area)) * 34
        y, x = np.mgrid[-48:48, -48:48] + 0.5
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if ay != by:
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
        return inside

    still = mask(first, 0)
    assert max(mask_iou(still, mask(second, degrees)) for degrees in range(0, 360, 9)) < 0.91


def test_shapes_stand_out_from_what_is_around_them(wide):
    for scene in wide:
        for shape in scene.shapes:
            assert contrast(shape, scene.size, scene.background) >= 70


def test_contrast_is_that_of_the_surroundings():
    scene = wide_scene_at(0, 1, num_objects=1, max_side=160)
    [shape] = scene.shapes
    x0, y0, x1, y1 = (round(edge) for edge in shape.box)
    background = np.full((scene.size[1], scene.size[0], 3), 255 - np.array(shape.rgb), np.uint8)
    far = contrast(shape, scene.size, background)
    background[y0:y1, x0:x1] = shape.rgb
    assert contrast(shape, scene.size, background) == 0 < far


def test_colours_stay_what_their_names_say(wide):
    """Light and noise do not take a shape's colour away from it."""
    for scene in wide[:50]:
        pixels = np.asarray(draw(scene), float)
        for shape, mask in zip(scene.shapes, masks(scene), strict=True):
            if mask.sum() > 400:
                assert np.abs(np.median(pixels[mask], axis=0) - shape.rgb).max() < 30


@pytest.mark.parametrize("paint", backdrops._PAINTERS, ids=lambda paint: paint.__name__)
def test_backgrounds_have_texture_and_muted_colours(paint):
    rng = np.random.default_rng(3)
    pictures = [paint(60, 80, rng).clip(0, 1) for _ in range(6)]
    assert all(picture.shape == (60, 80, 3) and np.isfinite(picture).all() for picture in pictures)
    assert np.mean([picture.std(axis=(0, 1)).max() for picture in pictures]) > 0.01
    for picture in pictures:
        most, least = picture.max(axis=2), picture.min(axis=2)
        bright = most > 0.2
        assert np.quantile(((most - least) / np.maximum(most, 1e-6))[bright], 0.98) <= 0.5 if bright.any() else True


def test_backgrounds_are_small_pictures_of_the_same_proportions():
    assert backdrops.backdrop((640, 480), np.random.default_rng(0)).shape == (192, 256, 3)
    assert backdrops.backdrop((100, 120), np.random.default_rng(0)).shape == (120, 100, 3)


def test_masks_at_all_rotations_fill_their_boxes():
    found = rotated_masks(np.random.default_rng(0), 60, 64)
    assert found.shape == (60, 64, 64) and found.dtype == bool
    assert np.mean([m.any(axis=0).mean() + m.any(axis=1).mean() for m in found]) > 1.9  # tips are thin
    assert len({m.tobytes() for m in found}) > 50
    np.testing.assert_array_equal(found, rotated_masks(np.random.default_rng(0), 60, 64))
    assert outline_mask(np.array([(0, 0), (3, 0), (3, 2), (0, 2)], float), 8).min() == 1
