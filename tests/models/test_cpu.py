"""Which operand of a product goes first is a matter of speed only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import cpu
from paligemma_jax.models.layers import linear


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
@pytest.mark.parametrize("first", [True, False])
def test_both_orders_give_the_product(monkeypatch, dtype, tolerance, rows, first):
    monkeypatch.setattr(cpu, "weight_first", lambda weight: first)
    x, weight = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(rows, 24), (40, 24)]))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(linear(x, weight), expected, atol=tolerance * 10)


def test_only_large_weights_are_measured_each_kind_once(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "_measured", lambda dtype: asked.append(dtype.name) or False)
    small, large = (jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16) for rows in (4, 8192))
    assert cpu.weight_first(small) and not cpu.weight_first(large)
    cpu.measure({"norm": jax.ShapeDtypeStruct((2**24,), jnp.bfloat16), "small": small, "large": large})
    cpu.measure({"quantized": jax.ShapeDtypeStruct((8192, 2048), jnp.int8)})
    assert asked == ["bfloat16", "bfloat16"]


def test_measuring_works_while_a_network_is_traced(monkeypatch):
    monkeypatch.setattr(cpu, "_SHAPE", (64, 32))
    monkeypatch.setattr(cpu, "_LARGE", 0)
    cpu._measured.cache_clear()
    x, weight = jnp.ones((2, 16)), jnp.ones((8, 16))
    np.testing.assert_array_equal(jax.jit(linear)(x, weight), np.full((2, 8), 16.0))
    assert cpu._measured.cache_info().currsize == 1
    cpu._measured.cache_clear()
