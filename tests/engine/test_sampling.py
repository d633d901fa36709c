"""What may be drawn, how often, and what the model thinks of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax import ops
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine.sampling import (
    RowOptions,
    allow,
    choose,
    filter_logits,
    forbid,
    is_eos,
    row_keys,
    row_options,
    step_config,
    token_logprobs,
    token_scores,
)
from paligemma_jax.processing.request import GenerateOptions, Sampling

LOGITS = jax.random.normal(jax.random.key(0), (4, 50)) * 2.0


ALL_FILTERS = ("top_k", "top_p", "min_p")


def rows_of(samplings: list[Sampling], requests=None) -> RowOptions:
    seeds = [sampling.seed for sampling in samplings]
    keys = row_keys(seeds, requests or ["the same"] * len(seeds))
    return row_options([GenerateOptions(sampling=sampling) for sampling in samplings], keys, None)


def geometry(num_allowed: int) -> PaliGemmaConfig:
    return PaliGemmaConfig(None, None, image_token_id=num_allowed)


def kept(sampling: Sampling, logits: jax.Array = LOGITS) -> np.ndarray:
    """By the filters that are in use, and by all of them."""
    options = rows_of([sampling] * len(logits))
    used = step_config(None, None, [GenerateOptions(sampling=sampling)], False).filters
    one, every = (np.isfinite(_filter(logits, options, names)) for names in (used, ALL_FILTERS))
    np.testing.assert_array_equal(one, every)
    return one


_filter = jax.jit(filter_logits, static_argnums=2)
_choose = jax.jit(choose, static_argnums=4)


def draw(sampling: Sampling, logits: jax.Array, count: int, num_allowed: int = 50) -> np.ndarray:
    """`count` tokens of one distribution [V]."""
    config = step_config(geometry(num_allowed), None, [GenerateOptions(sampling=sampling)], False)
    rows = jnp.broadcast_to(logits, (count, len(logits)))
    return np.asarray(_choose(rows, jnp.zeros(count, jnp.int32), rows_of([sampling] * count), None, config)[0])


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
    out = np.asarray(_filter(jnp.array([logits], jnp.float32), rows_of([sampling]), ALL_FILTERS))[0]
    assert np.isfinite(out[np.array(logits) == max(logits)]).any()  # of equals, which -0.0 and 0.0 are, not each
    assert not np.isnan(out).any()


def test_each_row_has_its_own_settings():
    """As if it were alone, and a row that is greedy among them is."""
    samplings = [
        Sampling(temperature=0.7, top_k=3),
        Sampling(),
        Sampling(temperature=2.0, top_p=0.4),
        Sampling(temperature=1.0, min_p=0.5),
    ]
    together = np.isfinite(_filter(LOGITS, rows_of(samplings), ALL_FILTERS))
    for row in (0, 2, 3):
        np.testing.assert_array_equal(together[row], kept(samplings[row])[row])
    config = step_config(geometry(50), None, [GenerateOptions(sampling=sampling) for sampling in samplings], False)
    steps = jnp.arange(4, dtype=jnp.int32)
    tokens, scores = _choose(LOGITS, steps, rows_of(samplings, "abcd"), None, config)
    for row, sampling in enumerate(samplings):
        alone, score = _choose(
            LOGITS[row : row + 1], steps[row : row + 1], rows_of([sampling], "abcd"[row]), None, config
        )
        assert alone[0] == tokens[row] and together[row, alone[0]]
        np.testing.assert_allclose(score.logprobs[0], scores.logprobs[row], rtol=1e-6)
    assert tokens[1] == LOGITS[1].argmax()


def test_several_sequences_of_a_row_share_its_settings():
    """Row after row, as drafts and beams have them; each draws with the number of its own step."""
    samplings = [Sampling(temperature=2.0, top_k=4, seed=1), Sampling()]
    config = step_config(geometry(50), None, [GenerateOptions(sampling=sampling) for sampling in samplings], False)
    tokens, _ = _choose(LOGITS, jnp.array([0, 1, 0, 1]), rows_of(samplings), None, config)
    for step in range(2):
        alone, _ = _choose(LOGITS[step::2], jnp.full(2, step), rows_of(samplings), None, config)
        np.testing.assert_array_equal(tokens[step::2], alone)


def test_the_end_is_not_chosen_before_the_least_number_of_tokens():
    end = PaliGemmaConfig(None, None, image_token_id=50, eos_token_id=int(LOGITS[0].argmax()))
    for temperature in (0.0, 1e-3):
        options = GenerateOptions(9, Sampling(temperature), min_new_tokens=4)
        config = step_config(end, None, [options, GenerateOptions()], False)
        rows = row_options([options, GenerateOptions()] * 2, row_keys([0] * 4, "abcd"), None)
        logits = jnp.broadcast_to(LOGITS[:1], LOGITS.shape)
        chosen = [_choose(logits, jnp.full(4, step), rows, None, config)[0] == end.eos_token_id for step in range(5)]
        np.testing.assert_array_equal(chosen, [[False, True] * 2] * 3 + [[True] * 4] * 2)


@pytest.mark.parametrize("ids", [(7,), (1, 7), (7, 3, 49)])
def test_any_id_of_the_end_ends_and_waits_for_the_least_number_of_tokens(ids):
    config = PaliGemmaConfig(None, None, image_token_id=50, eos_token_id=ids[0], more_eos_ids=ids[1:])
    np.testing.assert_array_equal(np.flatnonzero(is_eos(jnp.arange(60), config)), sorted(ids))
    options = GenerateOptions(9, min_new_tokens=4)
    rows = row_options([options], row_keys([0], "a"), None)
    for step, expected in ((0, set(ids)), (2, set(ids)), (3, set())):
        step_options = step_config(config, None, [options], False)
        allowed = allow(jnp.zeros((1, 50)), jnp.array([step]), rows, None, step_options)
        assert {*np.flatnonzero(~np.isfinite(allowed[0])).tolist()} == expected


@pytest.mark.parametrize("added", [(), ((51, 53),), ((51, 52), (55, 57), (58, 60))])
def test_ids_without_a_name_are_forbidden(added):
    config = PaliGemmaConfig(None, None, image_token_id=50, added_ids=added)
    allowed = np.flatnonzero(np.isfinite(forbid(jnp.zeros(60), config)))
    np.testing.assert_array_equal(allowed, [*range(50), *(id_ for ids in added for id_ in range(*ids))])


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
    sampling = Sampling(temperature=3.0, top_k=2)
    config = step_config(geometry(30), None, [GenerateOptions(sampling=sampling)], False)
    tokens, scores = _choose(LOGITS, jnp.zeros(4, jnp.int32), rows_of([sampling] * 4, range(4)), None, config)
    expected = jax.nn.log_softmax(LOGITS, axis=-1)[np.arange(4), tokens]
    np.testing.assert_allclose(scores.logprobs, expected, rtol=1e-5)
    np.testing.assert_allclose(token_logprobs(LOGITS, tokens), expected, rtol=1e-5)


def test_scores_of_locations_are_those_of_all_near_them():
    """`near` sums the probabilities of locations at most 32 away; `expected` is the mean among locations."""
    logits = np.array(jax.random.normal(jax.random.key(1), (3, 1100)) * 2.0)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    start, tokens = 50, np.array([[50, 60, 49], [50 + 1023, 50 + 500, 50 + 1024], [0, 50 + 32, 1099]])
    scores = token_scores(jnp.asarray(logits), jnp.asarray(tokens), start)
    locations = probabilities[:, start : start + 1024]
    for row in range(3):
        for i, token in enumerate(tokens[row] - start):
            near = locations[row, max(0, token - 32) : token + 33].sum() if 0 <= token < 1024 else 0.0
            np.testing.assert_allclose(scores.near[row, i], near, atol=1e-6)
            np.testing.assert_allclose(scores.logprobs[row, i], np.log(probabilities[row, token + start]), atol=1e-5)
    mean = locations @ np.arange(1024) / locations.sum(-1)
    np.testing.assert_allclose(scores.expected, np.broadcast_to(mean[:, None], (3, 3)), rtol=1e-4)
    without = token_scores(jnp.asarray(logits), jnp.asarray(tokens), None)
    np.testing.assert_array_equal(without.logprobs, scores.logprobs)
    assert not without.near.any() and not without.expected.any()


def test_row_keys_depend_on_seed_and_copies_but_not_on_neighbours():
    data = jax.random.key_data
    together = data(row_keys([3, 3, 3, 4], ["a", "b", "a", "a"]))
    np.testing.assert_array_equal(together[0], data(row_keys([3], ["a"]))[0])
    np.testing.assert_array_equal(together[1], data(row_keys([3], ["b"]))[0])
    assert (together[2] != together[0]).any()
    np.testing.assert_array_equal(together[3], data(row_keys([4], ["a"]))[0])  # no copy: another seed
    assert (together[3] != together[0]).any()
    row_keys([2**32 - 1], ["a"])


def test_the_first_of_the_largest_is_found_and_nan_gives_some_token():
    rows = jnp.array([[1.0, 3.0, 3.0, 2.0], [-jnp.inf] * 4, [-1.0, -2.0, -3.0, -1.0], [jnp.inf, 0.0, jnp.inf, 1.0]])
    np.testing.assert_array_equal(ops.argmax(rows), jnp.argmax(rows, axis=-1))
    assert ops.argmax(jnp.full((1, 4), jnp.nan))[0] == 0
