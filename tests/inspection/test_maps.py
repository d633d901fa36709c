"""Maps over patches: what must hold whatever the model."""

import dataclasses

import numpy as np
import pytest

from paligemma_jax.errors import PromptError
from paligemma_jax.inspection import maps
from paligemma_jax.inspection.words import Word
from paligemma_jax.ops import quantize


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(9, 16)) + 3


def test_a_patch_is_most_like_itself(vectors):
    for place in range(9):
        alone = maps.centred_similarity(vectors, vectors[place : place + 1])
        directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        expected = np.sum((directions[place] - directions.mean(axis=0)) ** 2)
        np.testing.assert_allclose(alone[place], expected, rtol=1e-4)
        assert alone.mean() == pytest.approx(0, abs=1e-6)


def test_similarity_does_not_depend_on_lengths(vectors):
    text, lengths = vectors[:2], np.arange(1, 10)[:, None]
    np.testing.assert_allclose(
        maps.centred_similarity(vectors * lengths, text * 7), maps.centred_similarity(vectors, text), atol=1e-6
    )


def test_patches_that_are_all_the_same_are_like_nothing(vectors):
    np.testing.assert_allclose(maps.centred_similarity(np.ones((9, 16)), vectors), 0, atol=1e-6)
    assert np.isfinite(maps.centred_similarity(np.zeros((9, 16)), vectors)).all()


def test_a_text_is_like_soft_tokens_that_are_its_embeddings(model):
    ids = model.processor.tokenizer.encode(" red circle and two blue squares ?")
    rows = maps.token_embeddings(model.params, ids)
    place = ids.index(*model.processor.tokenizer.encode(" red"))
    assert maps.table_similarity(model, 5 * rows, "red").argmax() == place


def test_rows_of_a_rounded_table(model):
    weight = model.params["language_model"]["embed_tokens"]["weight"]
    rounded = {"language_model": {"embed_tokens": {"weight": quantize(weight, "int8")}}}
    ids = [5, 9]
    np.testing.assert_allclose(maps.token_embeddings(rounded, ids), maps.token_embeddings(model.params, ids), atol=0.02)
    with pytest.raises(PromptError, match="give a word"):
        maps.token_embeddings(model.params, [])


def test_hidden_similarity_is_of_all_states_between_layers(model, trace):
    word = maps.find_in_prompt(trace, model.processor.tokenizer, "red circle")
    found = maps.hidden_similarity(trace, word)
    assert found.shape == (4, 9) and found.dtype == np.float32
    np.testing.assert_array_equal(
        found[0], maps.centred_similarity(trace.soft_tokens[0], trace.hidden[0, word.start : word.stop])
    )


def test_a_patch_among_the_words_is_most_like_itself(trace):
    at = int(np.flatnonzero(trace.patches == 4)[0])
    found = maps.hidden_similarity(trace, Word("", at, at + 1))
    assert (found[:, 4] > 0).all()


def test_attention_sums_to_one_over_patches_or_what_text_leaves(trace):
    shares, weights = maps.attention(trace, renormalize=True), maps.attention(trace)
    assert shares.shape == (3, 4, len(trace.logprobs), 9)
    sums = weights.sum(axis=-1)
    assert (sums < 1).all()
    # In every second layer the window of 5 has moved on from the picture after a few tokens.
    np.testing.assert_allclose(shares.sum(axis=-1)[sums > 0], 1, atol=1e-5)
    np.testing.assert_allclose(sums, 1 - trace.attention[..., trace.patches < 0].sum(axis=-1), atol=1e-5)


def test_the_upper_half_is_that_of_the_layers():
    values = np.arange(5.0)
    assert maps.upper_half(values[:4], 4) == 2.5 and maps.upper_half(values, 4) == 3.5  # states between have one more
    assert maps.upper_half(values[:1], 1) == 0


def test_words_are_found_in_the_prompt_not_in_the_answer(model, trace):
    tokenizer = model.processor.tokenizer
    word = maps.find_in_prompt(trace, tokenizer, "circle")
    assert word.stop < trace.prefix_length
    assert "circle" in tokenizer.decode(trace.tokens[word.start : word.stop])
    with pytest.raises(PromptError, match="'square' is not part of 'detect red circle'"):
        maps.find_in_prompt(trace, tokenizer, "square")


def test_the_grid_is_in_reading_order():
    squares = maps.grid(np.arange(18).reshape(2, 9), 9)
    assert squares.shape == (2, 1, 3, 3)
    assert squares[1, 0].tolist() == [[9, 10, 11], [12, 13, 14], [15, 16, 17]]


def test_several_pictures_are_as_many_squares(model, picture):
    """Four of nine patches are no square of six."""
    trace = model.trace([picture, picture.rotate(90)] * 2, "detect red circle", "red circle")
    values = maps.attention(trace)
    squares = maps.grid(values, trace.soft_tokens.shape[1])
    assert values.shape[-1] == 36 and squares.shape == (*values.shape[:-1], 4, 3, 3)
    np.testing.assert_array_equal(squares[..., 2, :, :].reshape(*values.shape[:-1], 9), values[..., 18:27])
    with pytest.raises(ValueError, match="reshape"):
        maps.grid(values, 16)


@pytest.mark.parametrize("layer, head", [(None, None), (0, 3), (2, None), (None, 1)])
def test_a_layer_and_a_head_or_their_means(layer, head):
    weights = np.random.default_rng(0).normal(size=(3, 4, 2, 9))
    heads = maps.select_head(weights, head)
    np.testing.assert_allclose(heads, weights.mean(axis=1) if head is None else weights[:, head])
    found = maps.select_layer(heads, 3, layer)
    np.testing.assert_allclose(found, heads[1:].mean(axis=0) if layer is None else heads[layer])
    states = np.concatenate([np.full_like(heads[:1], np.nan), heads])  # before the first layer
    np.testing.assert_array_equal(maps.select_layer(states, 3, layer), found)


def test_patches_are_most_like_themselves(trace):
    found = maps.patch_similarity(trace)
    assert found.shape == (9, 9) and found.dtype == np.float32
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-5)
    assert (found <= 1 + 1e-5).all() and (found >= -1 - 1e-5).all() and np.ptp(found) > 0.5


def test_the_similarity_of_patches_is_that_of_their_differences_from_the_mean(trace):
    hidden = np.random.default_rng(0).normal(size=trace.hidden.shape) + 2
    found = maps.patch_similarity(dataclasses.replace(trace, hidden=hidden))
    directions = hidden[2:, trace.patches >= 0]
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    expected = np.mean([_cosines(x - x.mean(axis=0)) for x in directions], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _cosines(x: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def test_captured_embeddings_put_back_in_give_the_same_inside(model, picture, trace):
    again = model.trace(None, "detect red circle", "<loc0001><loc0002><loc1000><loc1023> red circle", trace.soft_tokens)
    for field in dataclasses.fields(trace):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(trace, field.name))
