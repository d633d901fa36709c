"""Where phrases are: each point has one owner, boxes fit masks, and what is drawn is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit import activation, locate
from paligemma_jax.tasks.overlap import box_iou
from tests.patch_vit.phrases_fake import FakeClip, FakeStudent, squares


def found_in(image, phrases, choice="auto", background=0, threshold=0.5):
    (maps,) = activation.phrase_maps(FakeStudent(), FakeClip(), [image], phrases, choice)
    return locate.locate(maps, image.size, threshold, background)


def random_maps(seed, count, shape, scale=4.0):
    logits = scale * np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
    return activation.PhraseMaps(tuple(f"phrase {i}" for i in range(count)), logits, np.full(count, 3 * scale))


SHAPES = st.sampled_from([(8, 8), (4, 11), (1, 1), (7, 7)])


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 4),
    shape=SHAPES,
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
@settings(deadline=None, max_examples=40)
def test_masks_are_apart_and_boxes_fit_them(seed, count, shape, size):
    maps = random_maps(seed, count, shape)
    objects = locate.locate(maps, size)
    assert sum((item.mask.astype(int) for item in objects), np.zeros(size[::-1], int)).max(initial=0) <= 1
    for item in objects:
        x0, y0, x1, y1 = map(int, item.box)
        assert item.mask.shape == size[::-1] and item.mask.any() and 0 <= item.score <= 1
        assert item.mask[y0:y1, x0:x1].sum() == item.mask.sum()
        inside = item.mask[y0:y1, x0:x1]
        assert inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all()


@given(seed=st.integers(0, 999), order=st.permutations(range(3)))
@settings(deadline=None, max_examples=20)
def test_the_order_of_phrases_only_orders_the_objects(seed, order):
    maps = random_maps(seed, 3, (8, 8))
    other = activation.PhraseMaps(tuple(maps.phrases[i] for i in order), maps.logits[list(order)], maps.units)
    first, second = locate.locate(maps, (64, 64)), locate.locate(other, (64, 64))
    shown = [sorted((item.label, item.box, round(item.score, 9)) for item in found) for found in (first, second)]
    assert shown[0] == shown[1]
    assert [item.label for item in second] == sorted((i.label for i in second), key=lambda p: other.phrases.index(p))


@given(seed=st.integers(0, 999), shift=st.floats(-50, 50), factor=st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_other_units_of_all_logits_change_nothing(seed, shift, factor):
    maps = random_maps(seed, 2, (4, 4), scale=2.0)
    moved = activation.PhraseMaps(maps.phrases, maps.logits * np.float32(factor) + np.float32(shift))
    pairs = list(zip(locate.locate(maps, (40, 40)), locate.locate(moved, (40, 40)), strict=True))
    assert all(a.label == b.label and box_iou(a.box, b.box) > 0.9 and b.score is None for a, b in pairs)


def test_what_is_drawn_is_found_and_named():
    red, blue = (8, 8, 72, 72), (136, 120, 216, 216)
    image = squares((red, (255, 0, 0)), (blue, (0, 0, 255)), size=(256, 256))
    objects = found_in(image, ["red", "blue"])
    assert [item.label for item in objects] == ["red", "blue"]
    assert box_iou(objects[0].box, red) > 0.5 and box_iou(objects[1].box, blue) > 0.5


def test_two_of_a_kind_are_two_objects_and_what_touches_is_one():
    apart = squares(((0, 0, 64, 64), (255, 0, 0)), ((128, 128, 256, 256), (255, 0, 0)), size=(256, 256))
    touching = squares(((0, 0, 128, 128), (255, 0, 0)), ((128, 64, 256, 256), (255, 0, 0)), size=(256, 256))
    assert len(found_in(apart, ["red"])) == 2
    assert len(found_in(touching, ["red"])) == 1


def test_background_phrases_keep_their_points_and_are_not_reported():
    image = squares(((0, 0, 128, 128), (255, 0, 0)), ((128, 0, 256, 128), (220, 200, 0)), size=(256, 256))
    (alone,) = found_in(image, ["red"])
    assert alone.box[2] > 200
    (item,) = found_in(image, ["red", "red and green"], background=1)
    assert item.label == "red" and item.box[2] <= 160


def test_an_even_map_has_no_object():
    assert found_in(squares(size=(64, 64)), ["red"]) == []


@pytest.mark.parametrize("color", [(255, 0, 0), (200, 90, 0), (140, 90, 90)])
def test_the_score_is_the_cosine_similarity_of_the_best_patch(color):
    (item,) = found_in(squares(((0, 0, 16, 16), color), size=(64, 64)), ["red"])
    longest = max(np.linalg.norm(np.array(c) / 127.5 - 1) for c in (color, (90, 90, 90)))
    assert item.score == pytest.approx(max(color[0] / 127.5 - 1, 0) / longest, abs=0.03)  # between centres of patches


def test_a_phrase_of_what_is_not_there_takes_no_points_of_what_is():
    there = np.full((8, 8), -1.0, np.float32)
    there[2:5, 2:5] = 4
    other = 0.1 * there - 2
    other[6, 6] = -1
    objects = locate.locate(activation.PhraseMaps(("other", "there"), np.stack([other, there])), (64, 64))
    assert [item.label for item in objects] == ["other", "there"]
    assert objects[0].box[0] >= 40 and box_iou(objects[1].box, (16, 16, 40, 40)) > 0.6


def test_a_lower_threshold_takes_more():
    areas = [
        sum(item.mask.sum() for item in locate.locate(random_maps(3, 1, (8, 8), 2.0), (64, 64), threshold))
        for threshold in (0.9, 0.5, 0.1)
    ]
    assert areas == sorted(areas) and areas[0] < areas[-1]


def test_interpolation_is_linear_between_centres():
    values = np.arange(12.0).reshape(1, 3, 4)
    fine = locate._interpolated(values)
    assert fine.shape == (1, 24, 32)
    y, x = (np.clip((np.arange(n) + 0.5) / 8 - 0.5, 0, n // 8 - 1) for n in (24, 32))
    np.testing.assert_allclose(fine[0], 4 * y[:, None] + x[None], atol=1e-12)


@pytest.mark.parametrize("threshold", [0, 1.0, float("nan"), -0.5])
def test_a_threshold_that_cannot_be_is_one_line(threshold):
    with pytest.raises(ConfigError, match="is not possible: give"):
        locate.locate(random_maps(0, 1, (2, 2)), (4, 4), threshold)


def test_points_that_touch_in_a_corner_are_one_object():
    owned = np.zeros((32, 32), bool)
    owned[4:12, 4:12] = owned[12:20, 12:20] = True
    (item,) = locate._components("x", owned, np.ones((32, 32)), None, (32, 32))
    assert item.box == (4, 4, 20, 20)
    owned[12:20, 12:14] = False
    assert len(locate._components("x", owned, np.ones((32, 32)), None, (32, 32))) == 2
