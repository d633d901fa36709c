"""One odd patch, off the diagonal and off the middle: whatever points at it has its rows and columns right."""

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.inspection import maps
from paligemma_jax.inspection.figures import figures
from paligemma_jax.inspection.findings import inspect_answer
from paligemma_jax.inspection.occlusion import occlusion

PROMPT, ANSWER = "detect red circle", "<loc0001> red"
ROW, COLUMN = 0, 2  # of three: neither is the other's mirror, nor is its transpose
ODD = 3 * ROW + COLUMN


@pytest.fixture(scope="module")
def odd_picture() -> np.ndarray:
    """Of the model's own size: grey but for one patch."""
    pixels = np.full((42, 42, 3), 120, np.uint8)
    pixels[14 * ROW : 14 * (ROW + 1), 14 * COLUMN : 14 * (COLUMN + 1)] = (250, 20, 60)
    return pixels


def _without(pixels: np.ndarray, patch: int) -> np.ndarray:
    """The picture with one patch in its mean colour."""
    row, column = divmod(patch, 3)
    hidden = pixels.copy()
    hidden[14 * row : 14 * (row + 1), 14 * column : 14 * (column + 1)] = pixels.mean((0, 1)).round()
    return hidden


@pytest.mark.parametrize("way", ["pixels", "tokens"])
def test_what_is_lost_is_lost_where_it_is_hidden(model, odd_picture, way):
    """Each patch by hand: the log-probability of the whole picture less that of the picture without the patch."""
    found = occlusion(model, odd_picture, PROMPT, ANSWER, size=1, way=way, progress=False)
    soft_tokens = np.asarray(model.embed_image(odd_picture))
    whole = model.score(odd_picture, PROMPT, ANSWER)[0]
    if way == "pixels":
        hidden = np.concatenate([model.embed_image(_without(odd_picture, patch)) for patch in range(9)])
    else:
        hidden = np.repeat(soft_tokens, 9, axis=0)
        hidden[np.arange(9), np.arange(9)] = soft_tokens[0].mean(axis=0)
    scores = np.stack(model.score(None, [PROMPT] * 9, [ANSWER] * 9, hidden))
    np.testing.assert_allclose(found, (whole - scores).T, atol=1e-4)
    assert np.abs(found.sum(axis=0)).argmax() == ODD or way == "tokens"
    assert len(np.unique(found.sum(axis=0).round(4))) > 1


def test_squares_of_two_patches_share_what_is_lost(model, odd_picture):
    """Of three patches a side: squares of 2 x 2, 2 x 1, 1 x 2 and 1, which are not told apart by symmetry."""
    found = occlusion(model, odd_picture, PROMPT, ANSWER, size=2, progress=False).sum(axis=0).reshape(3, 3)
    for square in (found[:2, :2], found[:2, 2:], found[2:, :2], found[2:, 2:]):
        np.testing.assert_array_equal(square, square[0, 0])
    assert len({float(found[at]) for at in ((0, 0), (0, 2), (2, 0), (2, 2))}) == 4
    assert np.abs(found).max() == np.abs(found[0, 2])


def test_figures_show_it_where_it_is(model, odd_picture):
    """Norms, similarity, attention and embeddings as the files have them: row by row."""
    kinds = ("norms", "similarity", "attention")
    found = inspect_answer(model, Image.fromarray(odd_picture), PROMPT, ANSWER, "red circle", kinds)
    arrays = {name: values for figure in figures(found) for name, values in figure.arrays.items()}
    soft_tokens = np.asarray(model.embed_image(odd_picture))[0]
    np.testing.assert_allclose(arrays["norms"][ROW, COLUMN], np.linalg.norm(soft_tokens[ODD]), rtol=1e-5)
    np.testing.assert_allclose(arrays["embeddings"][ODD], soft_tokens[ODD], rtol=1e-5)
    trace = model.trace(odd_picture, PROMPT, ANSWER)
    seen = trace.attention[..., trace.patches >= 0]
    shares = seen / np.maximum(seen.sum(axis=-1, keepdims=True), 1e-30)  # a window moves on from the picture
    np.testing.assert_allclose(arrays["attention"][..., ROW, COLUMN], shares[..., ODD], atol=1e-5)
    np.testing.assert_allclose(arrays["attention"][..., COLUMN, ROW], shares[..., 3 * COLUMN + ROW], atol=1e-5)
    assert np.abs(shares[..., ODD] - shares[..., 3 * COLUMN + ROW]).max() > 1e-4
    directions = np.array([token / np.linalg.norm(token) for token in soft_tokens])
    tokenizer = model.processor.tokenizer
    rows = np.asarray(model.params["language_model"]["embed_tokens"]["weight"])[tokenizer.encode(" red circle")]
    text = np.mean([row / np.linalg.norm(row) for row in rows], axis=0)
    mean = directions.mean(axis=0)
    expected = [(direction - mean) @ (text - mean) for direction in directions]
    np.testing.assert_allclose(arrays["similarity_table"], np.reshape(expected, (3, 3)), atol=1e-5)


def test_similarity_is_not_that_of_the_mirrored_patch():
    """Two patches of three sides of their own: which is which shows in each map of its own text."""
    patches = np.random.default_rng(1).normal(size=(9, 16))
    for patch in (2, 3, 7):
        assert maps.centred_similarity(patches, patches[patch : patch + 1]).argmax() == patch
