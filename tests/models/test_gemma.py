"""The decoder: what the cache, padding, later tokens and the window may and may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.models.gemma import Gemma

PREFIX, LENGTH = np.array([4, 9, 6]), np.array([12, 16, 9])  # three ragged rows; windows of 5 are passed in all


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, x, positions, prefix_length, length, cache=None, wanted=None):
    return Gemma(config).apply({"params": params}, x, positions, prefix_length, length, cache, wanted)


def forward(config, params, x, prefix_length=PREFIX, length=LENGTH, wanted=None):
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    return run(config, params, x, positions, np.asarray(prefix_length), np.asarray(length), None, wanted)


@pytest.fixture(scope="module")
def decoder(config, params):
    return config.text, params["language_model"]


@pytest.fixture(scope="module")
def x(config):
    return jax.random.normal(jax.random.key(0), (len(PREFIX), LENGTH.max(), config.text.width))


def test_cached_decode_equals_the_full_pass_row_by_row(decoder, x):
    full, _ = forward(*decoder, x)
    _, key_values = forward(*decoder, x[:, : PREFIX.max()], PREFIX, PREFIX)
    cache = ops.pad_cache(key_values, num_slots=20)
    for step in range((LENGTH - PREFIX).max()):
        at = np.minimum(PREFIX + step, LENGTH.max() - 1)
        new = x[np.arange(len(at)), at][:, None]
        hidden, cache = run(*decoder, new, at[:, None], PREFIX, at + 1, cache)
        for row in np.flatnonzero(PREFIX + step < LENGTH):
            np.testing.assert_allclose(hidden[row, 0], full[row, at[row]], atol=2e-5, err_msg=f"{row=} {step=}")


def test_several_tokens_at_once_continue_a_cache(decoder, x):
    full, _ = forward(*decoder, x)
    _, key_values = forward(*decoder, x[:, : PREFIX.max()], PREFIX, PREFIX)
    positions = PREFIX[:, None] + np.arange(3)
    new = np.take_along_axis(np.asarray(x), positions[..., None], axis=1)
    hidden, _ = run(*decoder, new, positions, PREFIX, PREFIX + 3, ops.pad_cache(key_values, num_slots=20))
    np.testing.assert_allclose(hidden, np.take_along_axis(np.asarray(full), positions[..., None], axis=1), atol=2e-5)


def test_wanted_columns_are_those_of_all_and_their_keys_and_values_too(decoder, x):
    full, key_values = forward(*decoder, x)
    wanted = np.stack([LENGTH - 1, PREFIX, PREFIX - 1, LENGTH - 1], axis=1)  # prefix and suffix, one of them twice
    some, the_same = forward(*decoder, x, wanted=wanted)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(full), wanted[..., None], axis=1), atol=2e-5)
    for one, other in zip(jax.tree.leaves(key_values), jax.tree.leaves(the_same), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_batch_equals_its_rows_alone_whatever_the_padding(decoder, x):
    full, _ = forward(*decoder, x)
    for row, length in enumerate(LENGTH):
        padded = jnp.full((1, 24, x.shape[2]), 7.0).at[0, :length].set(x[row, :length])
        alone, _ = forward(*decoder, padded, PREFIX[row : row + 1], LENGTH[row : row + 1])
        np.testing.assert_allclose(alone[0, :length], full[row, :length], atol=2e-5)


def test_a_suffix_token_changes_nothing_before_it_and_a_prefix_token_all(decoder, x):
    full, _ = forward(*decoder, x)
    for changed in (PREFIX[0], PREFIX[0] + 4):
        other, _ = forward(*decoder, x.at[0, changed].add(1.0))
        np.testing.assert_array_equal(other[0, :changed], full[0, :changed])
        assert jnp.abs(other[0, changed] - full[0, changed]).max() > 1e-2
        np.testing.assert_array_equal(other[1:], full[1:])
    other, _ = forward(*decoder, x.at[0, PREFIX[0] - 1].add(1.0))
    assert (jnp.abs(other - full)[0, : LENGTH[0]].max(axis=-1) > 1e-4).all()


def test_only_even_layers_are_windowed(gemma2, random_params):
    text = gemma2.text
    assert [text.window(i) for i in range(3)] == [5, None, 5]
    x = jax.random.normal(jax.random.key(0), (1, 16, text.width))
    local = dataclasses.replace(text, num_layers=1)
    params = random_params(gemma2)["language_model"]
    full, _ = forward(local, params, x, [4], [16])
    other, _ = forward(local, params, x.at[0, 4].add(1.0), [4], [16])
    changed = np.abs(np.asarray(other - full))[0].max(axis=-1) > 1e-6
    assert np.flatnonzero(changed).tolist() == [4, 5, 6, 7, 8]  # the window of the token itself and four more
    without, _ = forward(dataclasses.replace(local, sliding_window=None), params, x, [4], [16])
    np.testing.assert_array_equal(without[0, :5], full[0, :5])  # the prefix is not windowed, the window still full
    assert jnp.abs(without[0, 9:] - full[0, 9:]).max() > 1e-3


def test_softcaps_and_query_scalar_matter(gemma2, random_params):
    text, params = gemma2.text, random_params(gemma2)["language_model"]
    x = 3.0 * jax.random.normal(jax.random.key(0), (1, 16, text.width))
    full, _ = forward(text, params, x, [4], [16])
    for change in ({"attn_softcap": None}, {"query_scalar": 6.0}):
        other, _ = forward(dataclasses.replace(text, **change), params, x, [4], [16])
        assert jnp.abs(other - full).max() > 1e-3, change
    logits = functools.partial(Gemma(text).apply, {"params": params}, method="logits")
    assert jnp.abs(logits(100.0 * full)).max() <= text.final_softcap
