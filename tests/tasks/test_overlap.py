import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.tasks.overlap import box_iou, box_ious, clip_box, mask_iou

corners = st.integers(-4, 12)


@st.composite
def boxes(draw):
    (x0, x1), (y0, y1) = (sorted((draw(corners), draw(corners))) for _ in range(2))
    return x0, y0, x1, y1


@settings(deadline=None, derandomize=True)
@given(st.lists(boxes(), max_size=5), st.lists(boxes(), max_size=5))
def test_all_pairs_agree_with_single_ones(first, second):
    expected = np.array([[box_iou(a, b) for b in second] for a in first]).reshape(len(first), len(second))
    np.testing.assert_allclose(box_ious(first, second), expected)


@settings(deadline=None, derandomize=True)
@given(boxes())
def test_a_clipped_box_is_what_of_it_is_in_the_picture(box):
    canvas = np.zeros((20, 20), bool)  # the picture is its part from 6, 6 to 14, 12
    canvas[box[1] + 6 : box[3] + 6, box[0] + 6 : box[2] + 6] = True
    x0, y0, x1, y1 = clip_box(box, (8, 6))
    assert 0 <= x0 <= x1 <= 8 and 0 <= y0 <= y1 <= 6
    assert (x1 - x0) * (y1 - y0) == canvas[6:12, 6:14].sum()


def test_box_iou_agrees_with_counting_pixels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = np.sort(rng.integers(0, 20, (2, 2, 2)), axis=1)  # box, (low, high), (x, y)
        grids = np.zeros((2, 20, 20), bool)
        for grid, ((x0, y0), (x1, y1)) in zip(grids, boxes, strict=True):
            grid[y0:y1, x0:x1] = True
        a, b = (tuple(map(float, box.ravel())) for box in boxes)
        assert box_iou(a, b) == pytest.approx(mask_iou(*grids))
        assert box_iou(a, b) == box_iou(b, a)


def test_nothing_overlaps_nothing():
    assert box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    assert mask_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0.0
