"""Both drawing programs keep what the description of the pictures promises, in either world."""

import ast
import hashlib
import inspect

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.shapes_world import foreign_backdrops, foreign_scenes
from paligemma_jax.shapes_world.foreign_scenes import foreign_sample, wide_foreign_sample
from paligemma_jax.shapes_world.samples import scene_sample, wide_sample

SOURCES = {  # with the fewest and the most objects, and the most that tips may be short of their box
    scene_sample: (1, 4, 3),
    foreign_sample: (1, 4, 3),
    wide_sample: (0, 5, 5),
    wide_foreign_sample: (0, 5, 5),
}


@pytest.mark.parametrize("source", list(SOURCES))
def test_truth_fits_the_picture(source):
    fewest, most, tips = SOURCES[source]
    for index in range(8):
        sample = source(3, index)
        width, height = sample.image.size
        side = min(width, height)
        assert sample.image.mode == "RGB" and 0.5 <= width / height <= 2
        assert fewest <= len(sample.kinds) == len(sample.boxes) == len(sample.masks) <= most
        assert sample.masks.shape[1:] == (height, width)
        assert not (sample.masks.sum(axis=0) > 1).any()  # nothing hides anything
        for (x0, y0, x1, y1), mask in zip(sample.boxes, sample.masks, strict=True):
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert side / 8 - 0.01 <= max(x1 - x0, y1 - y0) <= side / 2 + 0.01
            rows, columns = np.nonzero(mask)
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.subtract(found, (x0, y0, x1, y1))).max() < tips  # sharp tips are thinner than a pixel


@pytest.mark.parametrize("source", list(SOURCES))
def test_the_same_seed_and_index_give_the_same_picture(source):
    first, second = source(1, 2), source(1, 2)
    assert first.image.tobytes() == second.image.tobytes() and first.boxes == second.boxes
    assert source(1, 3).image.tobytes() != first.image.tobytes()


def test_things_of_the_other_program_have_the_colour_of_their_name():
    names = {"red": (0, 1, 1), "green": (1, 0, 1), "blue": (1, 1, 0)}  # channels that are low
    for sample in [source(4, index) for source in (foreign_sample, wide_foreign_sample) for index in range(3)]:
        pixels = np.asarray(sample.image, float)
        for (color, _), mask in zip(sample.kinds, sample.masks, strict=True):
            if color in names:
                mean = pixels[mask].mean(axis=0)
                assert mean.argmax() == names[color].index(0)


@pytest.mark.parametrize(
    "source, expected",
    [
        (scene_sample, "a080781f7947536b"),
        (foreign_sample, "3e40ee62b6e0e395"),
    ],
)
def test_calm_scenes_of_a_seed_are_those_that_were_measured(source, expected):
    """The first scenes of the evaluation: labels to a thousandth of a pixel, and the image in small."""
    digest = hashlib.sha256()
    for index in range(12):
        sample = source(20_000_000, index)
        labels = (
            sample.image.size,
            sample.kinds,
            np.round(sample.boxes, 3).tolist(),
            sample.masks.sum(axis=(1, 2)).tolist(),
        )
        digest.update(repr(labels).encode())
        digest.update(np.asarray(sample.image.resize((6, 6), Image.Resampling.BOX)).tobytes())
    assert digest.hexdigest()[:16] == expected


def test_some_wide_scenes_are_empty():
    for source in (wide_sample, wide_foreign_sample):
        counts = {len(source(6, index).kinds) for index in range(10)}
        assert 0 in counts and max(counts) >= 4


def test_turned_squares_and_diamonds_differ_in_the_second_program():
    """As a square picture shows them: what lies between is neither."""
    rng = np.random.default_rng(0)
    for width, height in ((300, 300), (400, 300), (300, 400)):
        slim = foreign_scenes._wide_slim((width, height))
        ratios = {}
        for shape in ("square", "diamond"):
            figures = [foreign_scenes._Figure(shape, 100, rng, 180.0, slim) for _ in range(60)]
            seen = [np.linalg.norm(np.subtract(*np.split(f.corners / (width, height), 2)), axis=1) for f in figures]
            ratios[shape] = [max(lengths) / min(lengths) for lengths in seen]
        assert max(ratios["square"]) < 1.34 and min(ratios["diamond"]) > 1.4


def test_the_second_program_shares_nothing_with_the_first():
    allowed = {"paligemma_jax.shapes_world.samples", "paligemma_jax.tasks.detection"}
    allowed |= {"paligemma_jax.shapes_world.foreign_backdrops"}
    for module in (foreign_scenes, foreign_backdrops):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("paligemma_jax"):
                assert node.module in allowed, node.module
                assert [alias.name for alias in node.names] == ["Sample"] or "samples" not in node.module
