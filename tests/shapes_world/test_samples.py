"""Both drawing programs keep what the description of the pictures promises."""

import numpy as np
import pytest

from paligemma_jax.shapes_world.foreign_scenes import foreign_sample
from paligemma_jax.shapes_world.samples import scene_sample


@pytest.mark.parametrize("source", [scene_sample, foreign_sample])
def test_truth_fits_the_picture(source):
    for index in range(12):
        sample = source(3, index)
        width, height = sample.image.size
        side = min(width, height)
        assert sample.image.mode == "RGB" and 0.5 <= width / height <= 2
        assert 1 <= len(sample.kinds) == len(sample.boxes) == len(sample.masks) <= 4
        assert sample.masks.shape[1:] == (height, width)
        assert not (sample.masks.sum(axis=0) > 1).any()  # nothing hides anything
        for (x0, y0, x1, y1), mask in zip(sample.boxes, sample.masks, strict=True):
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert side / 8 - 0.01 <= max(x1 - x0, y1 - y0) <= side / 2 + 0.01
            rows, columns = np.nonzero(mask)
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.subtract(found, (x0, y0, x1, y1))).max() < 3  # sharp tips are thinner than a pixel


@pytest.mark.parametrize("source", [scene_sample, foreign_sample])
def test_the_same_seed_and_index_give_the_same_picture(source):
    first, second = source(1, 2), source(1, 2)
    assert first.image.tobytes() == second.image.tobytes() and first.boxes == second.boxes
    assert source(1, 3).image.tobytes() != first.image.tobytes()


def test_things_of_the_other_program_have_the_colour_of_their_name():
    names = {"red": (0, 1, 1), "green": (1, 0, 1), "blue": (1, 1, 0)}  # channels that are low
    for index in range(12):
        sample = foreign_sample(4, index)
        pixels = np.asarray(sample.image, float)
        for (color, _), mask in zip(sample.kinds, sample.masks, strict=True):
            if color in names:
                mean = pixels[mask].mean(axis=0)
                assert mean.argmax() == names[color].index(0)
