"""Weights with a low-rank change against float64, over every kind of base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.checkpoints import low_rank

F, D, R, SCALE = 24, 32, 3, 2.5
BASES = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "int8": lambda w: ops.quantize(w, "int8"),
    "int8, activations as they are": lambda w: ops.quantize(w, "int8", quantize_activations=False),
    "int4": lambda w: ops.quantize(w, "int4"),
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weight(base="float32", dora=False):
    """B is not zero: alpha / r and alpha differ."""
    magnitude = jnp.abs(draw(F, seed=4)) + 0.5 if dora else None
    return ops.Lora(BASES[base](draw(F, D)), draw(R, D, seed=1), draw(F, R, seed=2), magnitude, SCALE)


def merged(lora):
    """float64 [F, D]."""
    down, up = (np.asarray(x, np.float64) for x in (lora.down, lora.up))
    whole = np.asarray(ops.dequantize(lora.base), np.float64) + SCALE * up @ down
    if lora.magnitude is None:
        return whole
    return whole * (np.asarray(lora.magnitude, np.float64) / np.linalg.norm(whole, axis=1))[:, None]


def test_the_branch_is_true_float32_on_every_platform():
    """Where a GPU or TPU would take narrower numbers for a matmul unless it is told otherwise."""
    x = draw(5, D, seed=3).astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda lora: (lora.matmul(x), lora.dequantize()))(weight("bfloat16", dora=True)))
    assert text.count("dot_general") == 1 + text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_matmul_rows_and_the_merged_weight_are_the_formula(base, dora):
    lora, x = weight(base, dora), draw(2, 5, D, seed=3)
    assert (lora.shape, lora.ndim, lora.size) == ((F, D), 2, F * D) and ops.is_weight(lora)
    whole = merged(lora)
    rounding = 2**-8 if base == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(ops.dequantize(lora), np.float64), whole, rtol=rounding, atol=1e-5)
    index = jnp.array([[3, 0], [23, 3]])
    np.testing.assert_allclose(
        np.asarray(ops.take_rows(lora, index), np.float64), whole[index], rtol=rounding, atol=1e-5
    )
    if base in ("float32", "int8, activations as they are"):
        np.testing.assert_allclose(ops.linear(x, lora), np.asarray(x) @ whole.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ops.linear(x, lora), ops.linear(x, ops.dequantize(lora)), rtol=1e-4, atol=1e-4)
    else:  # what the base makes of activations that it rounds, and the branch of those that are not
        of_base = np.asarray(ops.linear(x, lora.base), np.float64)
        change = SCALE * np.asarray(x, np.float64) @ np.asarray(lora.down, np.float64).T
        expected = of_base + change @ np.asarray(lora.up, np.float64).T
        if dora:
            plain = merged(ops.Lora(lora.base, lora.down, lora.up, None, SCALE))
            expected = expected * np.asarray(lora.magnitude) / np.linalg.norm(plain, axis=1)
        np.testing.assert_allclose(ops.linear(x, lora), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_the_formula(dora):
    """Of sum(y * c) with the norm of DoRA as a constant, by hand in float64."""
    lora, x, c = weight(dora=dora), draw(5, D, seed=3), draw(5, F, seed=5)
    found = jax.grad(lambda lora, x: jnp.sum(ops.linear(x, lora) * c), (0, 1))(lora, x)
    x, c, down, up = (np.asarray(a, np.float64) for a in (x, c, lora.down, lora.up))
    whole = np.asarray(lora.base, np.float64) + SCALE * up @ down
    norms = np.linalg.norm(whole, axis=1)
    factors = np.asarray(lora.magnitude, np.float64) / norms if dora else np.ones(F)
    scaled = c * factors
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(found[0].up, SCALE * scaled.T @ x @ down.T)
    close(found[0].down, SCALE * up.T @ scaled.T @ x)
    close(found[1], scaled @ whole)
    if dora:
        close(found[0].magnitude, np.sum(c * (x @ whole.T), axis=0) / norms)


@pytest.mark.parametrize("base", ["int8", "int4", "bfloat16"])
def test_adapters_over_any_base_have_gradients(base):
    lora, x = weight(base, dora=True), draw(5, D, seed=3)
    parts = {"down": lora.down, "up": lora.up, "magnitude": lora.magnitude}

    def loss(parts, x):
        return jnp.sum(ops.linear(x, ops.Lora(lora.base, **parts, scale=SCALE)) ** 2)

    grads, dx = jax.jit(jax.grad(loss, (0, 1)))(parts, x)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0.01 for g in (*grads.values(), dx))


def test_norms_of_rows_even_of_an_empty_one():
    lora = weight()
    empty = lora.base.at[7].set(0.0)
    found = ops.row_norms(empty, lora.down, lora.up.at[7].set(0.0), SCALE)
    expected = np.linalg.norm(np.asarray(empty) + SCALE * np.asarray(lora.up.at[7].set(0.0) @ lora.down), axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-15)
    still = ops.Lora(empty, lora.down, lora.up.at[7].set(0.0), found, SCALE)
    assert not np.asarray(ops.dequantize(still))[7].any() and np.isfinite(ops.dequantize(still)).all()


@pytest.mark.parametrize("dora", [False, True])
def test_merging_in_numpy_is_the_same(dora):
    lora = weight(dora=dora)
    magnitude = None if lora.magnitude is None else np.asarray(lora.magnitude)
    found = low_rank.merge(np.asarray(lora.base), np.asarray(lora.up), np.asarray(lora.down), SCALE, magnitude)
    np.testing.assert_allclose(found, ops.dequantize(lora), rtol=1e-5, atol=1e-5)


def test_it_says_what_it_is():
    assert "DoRA(rank 3, scale 2.5, over Int4(" in repr(weight("int4", dora=True))
