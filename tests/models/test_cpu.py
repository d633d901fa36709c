"""Which operand of a product goes first is a matter of speed only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import cpu
from paligemma_jax.models.layers import linear


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("first", [True, False])
def test_both_orders_give_the_product(monkeypatch, dtype, tolerance, rows, first):
    monkeypatch.setattr(cpu, "weight_first", lambda weight, rows: first)
    x, weight = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(rows, 24), (40, 24)]))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(linear(x, weight), expected, atol=tolerance * 10)


def test_gradients_pass_through_both_orders(monkeypatch):
    x, weight = jnp.ones((3, 8)), jax.random.normal(jax.random.key(0), (6, 8))
    for first in (True, False):
        monkeypatch.setattr(cpu, "weight_first", lambda weight, rows, first=first: first)
        found = jax.grad(lambda x: jnp.square(linear(x, weight)).sum())(x)
        np.testing.assert_allclose(found, 2 * x @ weight.T @ weight, rtol=1e-5, atol=1e-5)


def test_only_large_weights_are_measured_each_width_once(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "_gain", lambda dtype, width: asked.append((dtype.name, width)) or 1.0)
    small, large = (jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16) for rows in (4, 8192))
    assert not cpu.weight_first(small, 1) and not cpu.weight_first(large, 1)
    cpu.measure({"norm": jax.ShapeDtypeStruct((2**24,), jnp.bfloat16), "small": small, "large": large})
    cpu.measure({"quantized": jax.ShapeDtypeStruct((8192, 2048), jnp.int8)})
    assert asked == [("bfloat16", 2048)] * 2


@pytest.mark.parametrize("gain, few, many", [(1.05, False, False), (1.5, True, False), (6.0, True, True)])
def test_the_order_follows_a_clear_gain_and_with_many_rows_a_cliff(monkeypatch, gain, few, many):
    monkeypatch.setattr(cpu, "_gain", lambda dtype, width: gain)
    weight = jax.ShapeDtypeStruct((2048, 16384), jnp.bfloat16)
    assert [cpu.weight_first(weight, rows) for rows in (1, 16, 272)] == [few, few, many]


def test_measuring_works_while_a_network_is_traced(monkeypatch):
    monkeypatch.setattr(cpu, "_MEASURED", 64 * 16)
    monkeypatch.setattr(cpu, "_LARGE", 0)
    cpu._gain.cache_clear()
    x, weight = jnp.ones((2, 16)), jnp.ones((8, 16))
    np.testing.assert_array_equal(jax.jit(linear)(x, weight), np.full((2, 8), 16.0))
    assert cpu._gain.cache_info().currsize == 1
    cpu._gain.cache_clear()


@pytest.mark.parametrize("seconds, fast", [([1.0, 0.6], True), ([1.0, 1.3], True), ([1.0, 20.0], False)])
def test_unsigned_products_are_left_where_there_is_no_kernel_for_them(monkeypatch, seconds, fast):
    monkeypatch.setattr(cpu, "_seconds", lambda calls: seconds)
    assert cpu.unsigned_is_fast.__wrapped__() == fast
