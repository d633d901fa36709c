"""Words for soft tokens and for hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.engine import forward
from paligemma_jax.inspection import logit_lens
from paligemma_jax.ops import quantize


@pytest.fixture
def table(model) -> np.ndarray:
    return np.asarray(model.params["language_model"]["embed_tokens"]["weight"])


def _plain(table: np.ndarray, vectors: np.ndarray, centred: bool) -> np.ndarray:
    """All cosines at once."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    table, vectors = unit(table), unit(vectors)
    if centred:
        table, vectors = table - table.mean(axis=0), vectors - vectors.mean(axis=0)
    return unit(vectors) @ unit(table).T


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rows", [8192, 700, 1])
def test_nearest_is_the_same_in_parts(model, table, monkeypatch, centred, rows):
    if rows == 1:
        rows = model.config.image_token_id // 2 + 1  # the last part repeats nearly the whole first one
    monkeypatch.setattr(logit_lens, "_TABLE_ROWS", rows)
    vectors = np.random.default_rng(0).normal(size=(5, table.shape[1])).astype(np.float32)
    ids, cosines = logit_lens.nearest_tokens(model, vectors, 4, centred)
    expected = _plain(table[: model.config.image_token_id], vectors, centred)
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, axis=1), cosines, atol=1e-5)
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_an_embedding_is_nearest_to_itself(model, table):
    chosen = [40, 900, 1500]
    for centred in (True, False):
        ids, cosines = logit_lens.nearest_tokens(model, 3 * table[chosen], 2, centred)
        assert ids[:, 0].tolist() == chosen
    np.testing.assert_allclose(cosines[:, 0], 1, atol=1e-5)


def test_a_rounded_table_will_do(model, table):
    decoder = model.params["language_model"]
    embedder = {"weight": quantize(jnp.asarray(table), "int8")}
    rounded = dict(model.params, language_model=decoder | {"embed_tokens": embedder})
    other = type(model)(model.config, rounded, model.processor)
    assert logit_lens.nearest_tokens(other, table[[40, 900]], 1, centred=False)[0][:, 0].tolist() == [40, 900]


def test_the_last_layer_says_what_the_model_says(model, picture, trace):
    at = trace.prefix_length - 1 + np.arange(len(trace.logprobs))
    ids, probabilities = logit_lens.top_tokens(model, trace.hidden[:, at], 3)
    logits = model.logits(picture, "detect red circle", "<loc0001><loc0002><loc1000><loc1023> red circle")[0]
    logits[:, model.config.image_token_id :] = -np.inf
    expected = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert ids.shape == probabilities.shape == (4, len(at), 3)
    np.testing.assert_array_equal(ids[-1, :, 0], expected.argmax(axis=-1))
    np.testing.assert_allclose(probabilities[-1], -np.sort(-expected, axis=-1)[:, :3], atol=1e-5)


def test_layers_are_the_same_in_parts(model, trace, monkeypatch):
    together = logit_lens.top_tokens(model, trace.hidden[:, :7], 2)
    sizes, top_tokens = [], forward.top_tokens
    monkeypatch.setattr(logit_lens, "_MAX_LOGITS", 5 * model.config.text.vocab_size)
    monkeypatch.setattr(forward, "top_tokens", lambda p, h, **kw: sizes.append(len(h)) or top_tokens(p, h, **kw))
    for first, second in zip(together, logit_lens.top_tokens(model, trace.hidden[:, :7], 2), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert sizes == [4] * 7
