"""Windows cover the picture, and their maps make one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit import windows

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000)).filter(lambda size: max(size) < 30 * min(size))
CHOICES = st.sampled_from([windows.AUTO, windows.WHOLE, 1, 2, "3"])


@given(size=SIZES, side=st.sampled_from([4, 7, 8]), choice=CHOICES)
@settings(deadline=None, max_examples=60)
def test_every_cell_and_pixel_is_in_a_window_of_the_input_shape(size, side, choice):
    layout = windows.layout(size, side, 28 * side, choice)
    seen = np.zeros(layout.shape, int)
    for row, column in layout.corners:
        assert row + side <= layout.shape[0] and column + side <= layout.shape[1]
        seen[row : row + side, column : column + side] += 1
    assert seen.min() >= 1
    boxes = np.array([layout.box(corner) for corner in layout.corners])
    assert (boxes[:, :2].min(0) == 0).all() and (boxes[:, 2:].max(0) == size).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for axis in (0, 1):  # side by side without a gap
        parts = sorted({(low, high) for low, high in boxes[:, [axis, axis + 2]].tolist()})
        assert all(later[0] <= earlier[1] for earlier, later in itertools.pairwise(parts))


@given(size=SIZES, choice=CHOICES, value=st.floats(-5, 5))
@settings(deadline=None, max_examples=30)
def test_an_even_map_stays_even(size, choice, value):
    layout = windows.layout(size, 4, 112, choice)
    maps = np.full((len(layout.corners), 2, 4, 4), value, np.float32)
    np.testing.assert_allclose(windows.average(maps, layout), value, atol=1e-5)


def test_one_window_is_the_plain_map():
    rng = np.random.default_rng(0)
    for size in ((300, 300), (300, 360), (40, 37)):
        layout = windows.layout(size, 8, 224)
        maps = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
        assert layout.corners == ((0, 0),)
        np.testing.assert_array_equal(windows.average(maps, layout), maps[0])


def test_inner_patches_count_more():
    layout = windows.layout((48, 32), 4, 32, 1)
    assert layout.shape == (4, 6) and layout.corners == ((0, 0), (0, 2))
    maps = np.stack([np.zeros((1, 4, 4)), np.ones((1, 4, 4))])
    assert windows.average(maps, layout)[0, 1].tolist() == [0, 0, 1 / 3, 2 / 3, 1, 1]


@pytest.mark.parametrize(
    "size, shape",
    [
        ((224, 224), (8, 8)),
        ((640, 480), (8, 11)),
        ((1000, 900), (16, 18)),
        ((4000, 3000), (24, 32)),
        ((90, 30), (8, 24)),
    ],
)
def test_large_pictures_have_more_windows_and_nothing_is_enlarged_for_it(size, shape):
    assert windows.layout(size, 8, 224).shape == shape


@pytest.mark.parametrize("choice", ["all", 0, -1, 9, "1.5", ""])
def test_other_choices_are_one_line(choice):
    with pytest.raises(ConfigError, match=r"windows=.* give auto, off or a number from 1 to 8"):
        windows.layout((10, 10), 8, 224, choice)
