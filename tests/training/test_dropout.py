"""Dropout of the decoder: what is dropped depends on seed, step and row alone, and nothing is without a rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.layers import Dropout
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training.loss import dropout_keys, row_losses, suffix_loss, token_losses


@pytest.fixture(scope="module")
def batch(processor):
    laid_out = processor.layout([[0]] * 3, ["caption en"] * 3, ["a red circle"] * 3, pad_to=40)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 28, 28, 3)).astype(np.float32)
    return vars(dataclasses.replace(laid_out, pixels=pixels))


def test_values_are_dropped_at_the_rate_and_the_mean_is_kept():
    x = jnp.ones((3, 50, 40))
    dropped = np.asarray(Dropout(0.25, jnp.asarray(dropout_keys(0, 0, 3)))(x))
    assert set(np.unique(dropped).round(4)) == {0.0, np.float32(4 / 3).round(4)}
    np.testing.assert_allclose((dropped == 0).mean(axis=(1, 2)), 0.25, atol=0.04)
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.03)
    assert (dropped[0] != dropped[1]).any()
    assert (np.asarray(Dropout(0.25, jnp.asarray(dropout_keys(0, 0, 3))).fold_in(1)(x)) != dropped).any()


def test_keys_are_a_function_of_seed_and_step():
    keys = [dropout_keys(seed, step, 4) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    np.testing.assert_array_equal(keys[0], keys[3])
    assert keys[0].shape == (4, 2) and keys[0].dtype == np.uint32
    assert len({tuple(key) for three in keys[:3] for key in three.tolist()}) == 12


@pytest.fixture(scope="module")
def losses(small, random_params, batch):
    """losses(keys, rows=slice(None)): of each token with a dropout of 0.3, or without where keys are None."""
    model = PaliGemma(small)
    compute = jax.jit(lambda p, b, rate: token_losses(model, p, b, 6, dropout=rate)[0], static_argnums=2)

    def run(keys, rows=slice(None)):
        given = {name: value if name == "pixels" else value[rows] for name, value in batch.items()}
        if keys is None:
            return np.asarray(compute(random_params(small), given, 0.0))
        return np.asarray(compute(random_params(small), {**given, "dropout_keys": keys[rows]}, 0.3))

    return run


def test_rows_of_the_same_text_differ_by_their_keys_alone(losses):
    keys = dropout_keys(0, 0, 3)
    plain, dropped = losses(None), losses(keys)
    np.testing.assert_array_equal(plain[0], plain[1])
    assert (dropped[0] != dropped[1]).any() and (dropped != plain).any()
    np.testing.assert_array_equal(losses(keys), dropped)
    same = losses(np.stack([keys[0]] * 3))
    np.testing.assert_array_equal(same[0], same[1])


def test_a_batch_may_be_split(losses):
    """As accumulation and several devices do."""
    keys = dropout_keys(0, 0, 3)
    parts = np.concatenate([losses(keys, slice(0, 1)), losses(keys, slice(1, 3))])
    np.testing.assert_allclose(parts, losses(keys), rtol=1e-5)


def test_without_a_rate_the_program_is_the_same(small, random_params, batch):
    """No random number is drawn, and validation drops nothing."""
    model = PaliGemma(small)

    def text(**options):
        given = {**batch, "dropout_keys": dropout_keys(0, 0, 3)}
        return str(
            jax.make_jaxpr(lambda p, b: suffix_loss(model, 0.0, 6, p, b, **options))(random_params(small), given)
        )

    assert "threefry" not in text() and "random_bits" not in text() and "shift_right" in text(dropout=0.1)
    program = jax.make_jaxpr(lambda p, b: row_losses(model, 6, p, b))(random_params(small), batch)
    assert "threefry" not in str(program)
