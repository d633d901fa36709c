"""Masks as SVG paths: filled again, they are the masks."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from paligemma_jax.serving.http.outlines import svg_path

SCALE = 8


def filled(path, size):
    """A path drawn large by the even-odd rule, each cell looked at in its middle."""
    inside = np.zeros((size * SCALE, size * SCALE), bool)
    for loop in re.findall(r"M ([^Z]+) Z", path):
        corners = [tuple(float(v) * size * SCALE for v in pair.split()) for pair in loop.split(" L ")]
        picture = Image.new("1", (size * SCALE, size * SCALE))
        ImageDraw.Draw(picture).polygon([(x - 0.5, y - 0.5) for x, y in corners], fill=1)
        inside ^= np.asarray(picture)
    return inside[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]


@pytest.mark.parametrize("seed", range(5))
def test_random_masks(seed):
    mask = np.random.default_rng(seed).random((12, 12)) < 0.5
    assert (filled(svg_path(mask), 12) == mask).all()


def test_a_ring_has_two_loops_and_a_rectangle_four_corners():
    mask = np.zeros((10, 10), bool)
    mask[2:8, 1:6] = True
    assert svg_path(mask) == "M 0.1 0.2 L 0.6 0.2 L 0.6 0.8 L 0.1 0.8 Z"
    mask[4, 3] = False
    assert svg_path(mask).count("M") == 2
    assert (filled(svg_path(mask), 10) == mask).all()


def test_cells_that_touch_at_a_corner_are_apart():
    assert svg_path(np.eye(4, dtype=bool)).count("M") == 4


def test_nothing():
    assert svg_path(np.zeros((4, 4), bool)) == ""
