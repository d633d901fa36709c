"""Hiding parts of a picture: everything, nothing, and in between."""

import math

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.inspection.occlusion import WAYS, occlusion, squares

PROMPT, ANSWER = "detect red circle", "<loc0001> red"


@pytest.mark.parametrize("side, size", [(3, 1), (3, 2), (3, 3), (16, None), (8, None), (5, 4)])
def test_squares_tile_the_grid(side, size):
    masks = squares(side, size)
    assert (masks.sum(axis=0) == 1).all()
    assert len(masks) == math.ceil(side / (size or side / 8)) ** 2
    for mask in masks.reshape(-1, side, side):
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@pytest.mark.parametrize("way", WAYS)
def test_hiding_everything_leaves_a_picture_of_the_mean(model, picture, way):
    found = occlusion(model, picture, PROMPT, ANSWER, size=3, way=way, progress=False)
    if way == "pixels":
        pixels = np.asarray(picture.resize((42, 42), Image.Resampling.BICUBIC))
        blank = np.broadcast_to(pixels.mean(axis=(0, 1)).round().astype(np.uint8), pixels.shape)
        hidden = model.score(blank.copy(), PROMPT, ANSWER)[0]
    else:
        soft_tokens = np.asarray(model.embed_image(picture))
        soft_tokens = np.broadcast_to(soft_tokens.mean(axis=1, keepdims=True), soft_tokens.shape)
        hidden = model.score(None, [PROMPT], [ANSWER], soft_tokens)[0]
    lost = model.score(picture, PROMPT, ANSWER)[0] - hidden
    np.testing.assert_allclose(found, np.repeat(lost[:, None], 9, axis=1), atol=1e-4)
    assert np.abs(lost).max() > 1e-3


def test_nothing_is_lost_where_the_picture_is_of_one_colour(model):
    blank = Image.new("RGB", (30, 20), (90, 120, 30))
    np.testing.assert_allclose(occlusion(model, blank, PROMPT, ANSWER, progress=False), 0, atol=1e-4)


def test_batches_change_nothing(model, picture):
    many, one = (occlusion(model, picture, PROMPT, ANSWER, size=1, batch_size=n, progress=False) for n in (16, 2))
    assert many.shape == (len(model.score(picture, PROMPT, ANSWER)[0]), 9)
    np.testing.assert_allclose(many, one, atol=1e-4)
    assert len(np.unique(many.sum(axis=0).round(3))) > 3


def test_impossible_requests_are_named(model, picture):
    with pytest.raises(ConfigError, match="4 patches is not possible: give 1 to 3"):
        occlusion(model, picture, PROMPT, ANSWER, size=4)
    with pytest.raises(ConfigError, match=r"way='blur' .* pixels or tokens"):
        occlusion(model, picture, PROMPT, ANSWER, way="blur")
