"""How a product is spelt is a matter of speed only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import measured
from paligemma_jax.models import cpu, one_row, quantized
from paligemma_jax.models.layers import linear, measure


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 64, 65])
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(40, 128), (24, 384), (16, 2304), (9, 2368), (64, 4096)])
def test_a_single_row_in_a_loop_gives_the_product(dtype, shape):
    x, weight = (jax.random.normal(jax.random.key(i), size, dtype) for i, size in enumerate([shape[1:], shape]))
    expected = np.asarray(weight, np.float64) @ np.asarray(x, np.float64)
    assert one_row.fits(shape[1])
    for form in (*one_row.forms(shape[1]), one_row.Form(16, 128, 3)):
        product = functools.partial(one_row.product, form=form)
        for function in (jax.jit(product), product):
            np.testing.assert_allclose(function(x, weight), expected, atol=1e-5 * shape[1])


def test_a_single_row_takes_the_loop_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(cpu, "_LARGE", 0)
    x, weight = jax.random.normal(jax.random.key(0), (1, 128), "bfloat16"), jnp.ones((24, 128), "bfloat16")
    expected = np.broadcast_to(np.asarray(x, np.float64).sum(), (1, 24))
    first, second = one_row.forms(128)
    taken, product = [], one_row.product
    monkeypatch.setattr(one_row, "product", lambda row, weight, form: taken.append(form) or product(row, weight, form))
    for times, form in (
        ([1.0, 1.0, 1.0, 0.5, 0.6], first),
        ([1.0, 1.0, 1.0, 0.6, 0.5], second),
        ([1.0, 1.0, 1.0, 0.95, 0.96], None),
        ([0.4, 1.0, 1.0, 0.5, 0.5], None),
    ):
        monkeypatch.setattr(cpu, "_times", lambda dtype, width, times=times: times)
        assert cpu.loop(weight) == form
        np.testing.assert_allclose(linear(x, weight), expected, atol=1e-3)
    assert taken == [first, second]
    assert not cpu.loop(jnp.ones((24, 100), "bfloat16")) and not cpu.loop(jnp.ones((24, 128)))


def test_weights_of_8_bits_have_a_loop_if_they_are_signed(monkeypatch):
    monkeypatch.setattr(cpu, "_signed_times", lambda width: [1.0, 0.6, 0.5])
    signed, unsigned = (jax.ShapeDtypeStruct((8192, 2048), dtype) for dtype in ("int8", "uint8"))
    assert cpu.loop(signed) == one_row.forms(2048)[1] and cpu.loop(unsigned) is None
    monkeypatch.setattr(cpu, "_signed_times", lambda width: [1.0, 0.95, 0.92])
    assert cpu.loop(signed) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cpu, "_signed_times", lambda width: [1.0, 0.6, 0.5])
    assert cpu.loop(signed) is None


@pytest.mark.parametrize("times, chosen", [([1.0, 0.9], 0), ([1.0, 0.7], 1), ([1.0, 1.1], 0)])
def test_a_longer_program_must_be_worth_it(monkeypatch, times, chosen):
    monkeypatch.setattr(cpu, "_packed_times", lambda width, num_groups: times)

    def loop(num_outputs: int, num_groups: int) -> one_row.Form | None:
        values = jax.ShapeDtypeStruct((num_outputs, 1024), "uint8")
        return cpu.packed_loop(values, jax.ShapeDtypeStruct((num_outputs, num_groups), "int8"))

    assert loop(8192, 16) == one_row.PACKED_FORMS[chosen]
    assert loop(8, 16) is None and loop(8192, 256) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop(8192, 16) is None


def test_gradients_pass_through_the_loop():
    x, weight = jnp.ones(128), jax.random.normal(jax.random.key(0), (6, 128))
    found = jax.grad(lambda x: jnp.square(one_row.product(x, weight, one_row.forms(128)[1])).sum())(x)
    np.testing.assert_allclose(found, 2 * (weight @ x) @ weight, rtol=1e-4, atol=1e-4)


def test_only_large_weights_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "_times", lambda dtype, width: asked.append((dtype.name, width)) or [1.0] * 5)
    monkeypatch.setattr(cpu, "_signed_times", lambda width: asked.append(("int8", width)) or [1.0] * 3)
    monkeypatch.setattr(cpu, "_packed_times", lambda width, groups: asked.append((width, groups)) or [1.0] * 2)
    monkeypatch.setattr(quantized, "values_dtype", lambda: np.dtype("int8"))
    small, large = (jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16) for rows in (4, 8192))
    assert not cpu.weight_first(small, 1) and not cpu.weight_first(large, 1)
    measure({"norm": jax.ShapeDtypeStruct((2**24,), jnp.bfloat16), "small": small, "large": large})
    measure([quantized.abstract(large, bits) for bits in (8, 4)])
    assert asked == [("bfloat16", 2048)] * 3 + [("int8", 2048), (2048, 16)]


@pytest.mark.parametrize(
    "times, chosen",
    [
        ([1.05, 1.05, 1.0], [False, False, False]),
        ([1.05, 1.5, 1.0], [False, True, False]),
        ([1.5, 2.5, 1.0], [True, True, False]),
        ([6.0, 6.0, 1.0], [True, True, True]),
    ],
)
def test_the_order_follows_a_clear_gain_and_with_many_rows_a_cliff(monkeypatch, times, chosen):
    monkeypatch.setattr(cpu, "_times", lambda dtype, width: times)
    weight, smaller = (jax.ShapeDtypeStruct((rows, 16384), jnp.bfloat16) for rows in (2048, 128))
    assert [cpu.weight_first(weight, rows) for rows in (1, 16, 272)] == chosen
    assert cpu.weight_first(smaller, 64) == chosen[1] and not cpu.weight_first(smaller, 65)


@pytest.mark.parametrize("dtype, rows, filled", [("bfloat16", 1, 16), ("float16", 17, 32), ("bfloat16", 65, 65)])
def test_few_rows_in_half_precision_are_filled_up(dtype, rows, filled):
    arrays = (jax.ShapeDtypeStruct((count, 24), dtype) for count in (rows, 40))
    text = jax.jit(cpu._weight_first).lower(*arrays).as_text()
    assert f"tensor<40x{filled}xf32>" in text


def test_measuring_works_while_a_network_is_traced(monkeypatch):
    monkeypatch.setattr(cpu, "_MEASURED", 2 * 64 * 128)
    monkeypatch.setattr(cpu, "_LARGE", 0)
    cpu._times.cache_clear()
    x, weight = jnp.ones((2, 128), "bfloat16"), jnp.ones((8, 128), "bfloat16")
    np.testing.assert_array_equal(jax.jit(linear)(x, weight), np.full((2, 8), 128.0))
    assert cpu._times.cache_info().currsize == 1
    cpu._times.cache_clear()


@pytest.mark.parametrize(
    "seconds, fast", [([1.0, 0.6], True), ([1.0, 1.3], True), ([1.0, 3.0], True), ([1.0, 20.0], False)]
)
def test_unsigned_products_are_left_where_there_is_no_kernel_for_them(monkeypatch, seconds, fast):
    monkeypatch.setattr(measured, "remembered", lambda name, count, calls: seconds)
    assert cpu.unsigned_is_fast.__wrapped__() == fast
