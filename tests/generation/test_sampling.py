"""What may be drawn, how often, and which settings are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import SamplingError
from paligemma_jax.generation.sampling import (
    Sampling,
    choose,
    filter_logits,
    first_largest,
    row_keys,
    token_logprobs,
)

LOGITS = jax.random.normal(jax.random.key(0), (4, 50)) * 2.0


def kept(sampling: Sampling, logits: jax.Array = LOGITS) -> np.ndarray:
    return np.isfinite(jax.jit(filter_logits)(logits, sampling.rule()))


def draw(sampling: Sampling, logits: jax.Array, count: int, num_allowed: int = 50) -> np.ndarray:
    """`count` tokens of one distribution [V]."""
    keys = row_keys(sampling.seed, ["the same"] * count)
    rows = jnp.broadcast_to(logits, (count, len(logits)))
    return np.asarray(jax.jit(choose, static_argnums=4)(rows, keys, jnp.int32(0), sampling.rule(), num_allowed)[0])


@pytest.mark.parametrize("k", [1, 3, 50, 1000])
def test_top_k_keeps_the_k_largest(k):
    rank = np.argsort(np.argsort(-np.asarray(LOGITS), axis=-1), axis=-1)
    np.testing.assert_array_equal(kept(Sampling(temperature=0.7, top_k=k)), rank < k)


@pytest.mark.parametrize("p", [1e-9, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_top_p_keeps_the_smallest_set_that_holds_p(p, temperature):
    keep = kept(Sampling(temperature=temperature, top_p=p))
    probabilities = np.asarray(jax.nn.softmax(LOGITS / temperature, axis=-1), np.float64)
    for row, mask in zip(probabilities, keep, strict=True):
        assert row[mask].min() >= row[~mask].max(initial=0.0)
        assert row[mask].sum() >= p - 1e-6
        assert row[mask].sum() - row[mask].min() < p + 1e-6


def test_min_p_keeps_what_is_not_far_from_the_largest():
    probabilities = np.asarray(jax.nn.softmax(LOGITS / 2.0, axis=-1))
    expected = probabilities >= 0.3 * probabilities.max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(kept(Sampling(temperature=2.0, min_p=0.3)), expected)


def test_filters_combine_in_order():
    both = kept(Sampling(temperature=1.0, top_k=5, top_p=0.8))
    logits = jnp.where(kept(Sampling(temperature=1.0, top_k=5)), LOGITS, -jnp.inf)
    np.testing.assert_array_equal(both, kept(Sampling(temperature=1.0, top_p=0.8), logits))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.floats(1e-40, 1e6),
    st.integers(1, 9),
    st.floats(1e-40, 0.9999),
    st.floats(1e-40, 1.0),
)
def test_the_likeliest_token_is_always_kept(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    out = np.asarray(_filter(jnp.array([logits], jnp.float32), sampling.rule()))[0]
    assert np.isfinite(out[np.array(logits) == max(logits)]).any()  # of equals, which -0.0 and 0.0 are, not each
    assert not np.isnan(out).any()


_filter = jax.jit(filter_logits)


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    counts = np.bincount(draw(Sampling(temperature=1.0), logits, 4000, 3), minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2], atol=0.04)
    counts = np.bincount(draw(Sampling(temperature=0.5), logits, 4000, 3), minlength=3)
    np.testing.assert_allclose(counts / 4000, np.array([25, 9, 4]) / 38, atol=0.04)


def test_a_low_temperature_is_greedy():
    best = int(LOGITS[0].argmax())
    assert (draw(Sampling(temperature=1e-3), LOGITS[0], 64) == best).all()
    assert (draw(Sampling(), LOGITS[0], 4) == best).all()
    assert (draw(Sampling(temperature=5.0, top_k=1), LOGITS[0], 64) == best).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=100.0)], ids=["greedy", "hot"])
def test_ids_from_the_limit_on_are_never_chosen(sampling):
    tokens = draw(sampling, jnp.arange(20.0), 500, num_allowed=7)
    assert tokens.max() == 6


def test_logprobs_are_the_models_own_whatever_the_filters():
    tokens, odds = choose(LOGITS, row_keys(0, range(4)), jnp.int32(0), Sampling(temperature=3.0, top_k=2).rule(), 30)
    expected = jax.nn.log_softmax(LOGITS, axis=-1)[np.arange(4), tokens]
    np.testing.assert_allclose(odds.logprobs, expected, rtol=1e-5)
    np.testing.assert_allclose(token_logprobs(LOGITS, tokens), expected, rtol=1e-5)


def test_row_keys_depend_on_seed_and_copies_but_not_on_neighbours():
    data = jax.random.key_data
    together = data(row_keys(3, ["a", "b", "a"]))
    np.testing.assert_array_equal(together[0], data(row_keys(3, ["a"]))[0])
    np.testing.assert_array_equal(together[1], data(row_keys(3, ["b"]))[0])
    assert (together[2] != together[0]).any()
    assert (data(row_keys(4, ["a"]))[0] != together[0]).any()
    row_keys(2**32 - 1, ["a"])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 2}, "min_p=2"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 4, "temperature": 0.5}, "num_beams=4 with temperature=0.5"),
        ({"num_beams": True}, "num_beams=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_values_without_meaning_are_named_in_one_line(values, named):
    with pytest.raises(SamplingError) as error:
        Sampling(**values)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_of_numpy_are_taken():
    sampling = Sampling(top_k=np.int8(100), num_beams=np.int32(1), seed=np.uint32(7))
    assert sampling == Sampling(top_k=100, seed=7)
    assert {type(value) for value in (sampling.top_k, sampling.num_beams, sampling.seed)} == {int}


def test_the_first_of_the_largest_is_found_and_nan_gives_some_token():
    rows = jnp.array([[1.0, 3.0, 3.0, 2.0], [-jnp.inf] * 4, [-1.0, -2.0, -3.0, -1.0], [jnp.inf, 0.0, jnp.inf, 1.0]])
    np.testing.assert_array_equal(first_largest(rows), jnp.argmax(rows, axis=-1))
    assert first_largest(jnp.full((1, 4), jnp.nan))[0] == 0
