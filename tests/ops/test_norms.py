"""Normalisations against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4], ids=["eps counts", "unit", "large"])
def test_rms_norm(size):
    rng = np.random.default_rng(0)
    x, scale, eps = size * rng.standard_normal((3, 2, 96)), rng.standard_normal(96), 1e-6
    x[0, 0] = 0
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    found = ops.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), eps)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def test_layer_norm():
    rng = np.random.default_rng(0)
    x, scale, bias, eps = 3 + rng.standard_normal((3, 2, 96)), rng.standard_normal(96), rng.standard_normal(96), 1e-6
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias
    arrays = (jnp.asarray(array, jnp.float32) for array in (x, scale, bias))
    np.testing.assert_allclose(ops.layer_norm(*arrays, eps), expected, rtol=2e-4, atol=2e-5)


def test_the_result_has_the_dtype_of_the_input():
    x = jax.ShapeDtypeStruct((2, 96), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((96,), jnp.float32)
    assert jax.eval_shape(lambda x, w: ops.rms_norm(x, w, 1e-6), x, vector).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda x, w: ops.layer_norm(x, w, w, 1e-6), x, vector).dtype == jnp.bfloat16
