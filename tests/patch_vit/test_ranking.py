"""The best vectors for a query are those of a sort of all."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit import ranking


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_exact_is_a_stable_sort_of_all(count, k, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (count, 3)).astype(np.float32)  # many ties
    queries = rng.integers(-2, 3, (4, 3)).astype(np.float32)
    scores, rows = ranking.ranker(vectors)(queries, k)
    products = queries @ vectors.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(products, expected, 1))


def test_faiss_flat_is_exact_and_ivf_finds_what_is_near():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 16))
    vectors = (centres.repeat(50, 0) + 0.1 * rng.standard_normal((1000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[::50] * 3
    scores, rows = ranking.ranker(vectors)(queries, 5)
    flat_scores, flat_rows = ranking.ranker(vectors, "flat")(queries, 5)
    np.testing.assert_allclose(flat_scores, scores, rtol=1e-5)
    assert (flat_rows == rows).mean() > 0.95  # others are ties
    _, near = ranking.ranker(vectors, "ivf", lists=20, probes=5)(queries, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(near, rows, strict=True)]) > 0.9
    assert ranking.ranker(vectors[:3], "flat")(queries, 5)[1].shape == (20, 3)


def test_another_kind_or_no_faiss_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="ranking='fast' is not possible: give exact, flat, ivf"):
        ranking.ranker(np.zeros((1, 1), np.float32), "fast")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r'ranking=flat needs faiss: pip install -e "\.\[search\]"'):
        ranking.ranker(np.zeros((1, 1), np.float32), "flat")
