"""Few-bit weights against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.compiling import compiled
from paligemma_jax.models import cpu, few_rows, quantized
from paligemma_jax.models.layers import linear

WIDTHS = {"groups of 128": 256, "groups of 8": 48}


@pytest.fixture(scope="module", params=WIDTHS.values(), ids=WIDTHS)
def weight(request):
    """Rows of very different size, one of them empty."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, request.param)) * np.geomspace(1e-3, 1e3, 40)[:, None]
    rows[7] = 0
    return jnp.asarray(rows, jnp.float32)


def whole(weight, bits):
    """The weight that a quantized one stands for, worked out in numpy, and the step between two of its numbers."""
    found = jax.tree.map(np.asarray, quantized.quantize(weight, bits))
    if bits == 8:
        numbers = found.values.astype(np.float64) - (128 if found.values.dtype == np.uint8 else 0)
        return numbers * found.scale[:, None], found.scale[:, None]
    numbers = np.concatenate([found.values & 15, found.values >> 4], axis=1).astype(np.int64) - 8
    groups = found.multiplier.shape[1]
    step = found.scale[:, None] * np.repeat(found.multiplier, weight.shape[1] // groups, axis=1).astype(np.float64)
    assert np.abs(numbers).max() == 7 and found.multiplier.min() >= 1 and found.multiplier.max() == 18
    return numbers * step, step


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest(weight, bits):
    found, step = whole(weight, bits)
    assert found.shape == weight.shape
    # Where a group's largest number lies just above a multiplier's reach, it is clipped by a thousandth of it.
    assert (np.abs(found - np.asarray(weight, np.float64)) <= step * (0.51 if bits == 4 else 0.5001)).all()
    assert not found[7].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 40])
def test_product_is_that_of_rounded_activations(weight, bits, num_rows):
    x = np.random.default_rng(num_rows).normal(size=(num_rows, weight.shape[1])).astype(np.float32)
    x[-1] *= 50
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    expected = (np.round(x / scale) * scale.astype(np.float64)) @ whole(weight, bits)[0].T
    found = jax.jit(linear)(jnp.asarray(x), quantized.quantize(weight, bits))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max(axis=0).max())


@pytest.mark.parametrize(
    "bits, num_rows, num_outputs",
    [
        *((bits, rows, 48) for bits in (8, 4) for rows in (1, few_rows.MOST)),
        *(pytest.param(bits, rows, 48, marks=pytest.mark.slow) for bits in (8, 4) for rows in range(2, few_rows.MOST)),
        *((8, rows, outputs) for rows in (5, 13, few_rows.MOST_WHOLE) for outputs in (48, 40)),
    ],
)
@pytest.mark.parametrize(
    "width", [128, 2304, *(pytest.param(width, marks=pytest.mark.slow) for width in (768, 2048, 4608))]
)
def test_few_rows_as_sums_are_the_same_product(monkeypatch, bits, width, num_rows, num_outputs):
    name = {8: "whole_product", 4: "packed_product"}[bits]
    few = quantized.quantize(jax.random.normal(jax.random.key(0), (num_outputs, width)), bits)
    x = jax.random.normal(jax.random.key(1), (num_rows, width))
    products, taken, spelt = [], [], getattr(few_rows, name)
    monkeypatch.setattr(few_rows, name, lambda *args: taken.append(len(args[0])) or spelt(*args))
    for win in (False, True):
        for module in (cpu, quantized):
            monkeypatch.setattr(module, "sums_win", lambda weight, num_rows, win=win: win)
        # A function of its own, or it is not traced anew.
        products.append(jax.jit(functools.partial(quantized.product))(x, few))
    np.testing.assert_array_equal(*products)
    assert taken == [num_rows]


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_sums_of_4_bits_are_exact_at_the_ends_of_their_range(group, num_rows):
    rng, width = np.random.default_rng(0), 16384
    for rows, numbers in ((rng.choice([-127, 127], (num_rows, width)), rng.choice([-7, 7], (8, width))), (127, 7)):
        rows, numbers = np.broadcast_to(rows, (num_rows, width)), np.broadcast_to(numbers, (8, width))
        multiplier = np.full((8, width // group), 18)
        low, high = np.split(numbers + 8, 2, axis=1)
        packed = jnp.asarray(low | high << 4, jnp.uint8), jnp.asarray(multiplier, jnp.int8)
        found = few_rows.packed_product(jnp.asarray(rows, jnp.int8), *packed)
        np.testing.assert_array_equal(found, 18 * (rows @ numbers.T))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_activations_stay_as_they_are_where_they_are_not_rounded(weight, bits, dtype, tolerance):
    few = quantized.quantize(weight.astype(dtype), bits, rounds=False)
    x = jax.random.normal(jax.random.key(0), (3, weight.shape[1])) * jnp.array([[1.0], [1e3], [1e-3]])
    x = x.at[:, 0].mul(1e4).astype(dtype)  # next to such a number, 8 bits would leave nothing of the others
    expected = np.asarray(x, np.float64) @ whole(weight.astype(dtype), bits)[0].T
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(whole(weight.astype(dtype), bits)[0]).T
    assert (np.abs(linear(x, few) - expected) <= tolerance * size).all()
    assert quantized.abstract(jax.ShapeDtypeStruct((4, 64), dtype), bits, rounds=False).rounds is False


def test_values_of_the_right_form_are_left_where_they_are():
    for values in (np.zeros((2, 4), np.int8), np.zeros((2, 4), np.uint8)):
        assert quantized.as_values(values, values.dtype) is values


def test_a_large_weight_in_tiles_is_the_same_product(monkeypatch):
    weight = jax.random.normal(jax.random.key(0), (500, 128))  # the last tile overlaps the one before
    x = jax.random.normal(jax.random.key(1), (2, 128))
    few = quantized.quantize(weight, 4)
    at_once = quantized.product(x, few)
    monkeypatch.setattr(quantized, "_TILE", 64 * 128)
    np.testing.assert_array_equal(quantized.product(x, few), at_once)


def test_tiles_of_several_weights_share_their_room(monkeypatch):
    """XLA would make room for the results of all before the first is needed, if the loops began with plain zeros."""
    monkeypatch.setattr(quantized, "_TILE", 64 * 128)
    few, count = quantized.quantize(jax.random.normal(jax.random.key(0), (1024, 128)), 4), 6
    back = jax.ShapeDtypeStruct((128, 1024), "float32")

    def network(x: jax.Array, few: list[quantized.Quantized], back: jax.Array) -> jax.Array:
        for weight in few:
            x = jnp.tanh(quantized.product(x, weight) @ back.T)
        return x

    program = compiled(jax.jit(network), jax.ShapeDtypeStruct((64, 128), "float32"), [few] * count, back)
    assert program.memory_analysis().temp_size_in_bytes < 4 * 64 * 1024 * 4 < count * 64 * 1024 * 4


@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_whole_products_are_exact_at_the_ends_of_their_range(num_rows):
    rng = np.random.default_rng(0)
    rows, numbers = (rng.choice([-128, -127, -1, 0, 1, 127], (count, 64)) for count in (num_rows, 24))
    rows_8 = jnp.asarray(rows, jnp.int8)
    for weight in (jnp.asarray(numbers + 128, jnp.uint8), jnp.asarray(numbers, jnp.int8)):
        np.testing.assert_array_equal(cpu.whole_product(rows_8, weight), rows @ numbers.T)


def test_signed_values_give_the_same_product_and_rows_on_any_processor(weight, monkeypatch):
    monkeypatch.setattr(cpu, "unsigned_is_fast", lambda: True)
    unsigned = quantized.quantize(weight, 8)
    signed = dataclasses.replace(unsigned, values=(unsigned.values.astype(jnp.int16) - 128).astype(jnp.int8))
    x = jax.random.normal(jax.random.key(0), (3, weight.shape[1]))
    products = []
    for fast in (True, False):
        monkeypatch.setattr(cpu, "unsigned_is_fast", lambda fast=fast: fast)
        products += [quantized.product(x, few) for few in (signed, unsigned)]
        assert quantized.quantize(weight, 8).values.dtype == (jnp.uint8 if fast else jnp.int8)
    for found in products:
        np.testing.assert_array_equal(found, products[0])
    np.testing.assert_array_equal(quantized.rows_of(signed, jnp.arange(4)), quantized.rows_of(unsigned, jnp.arange(4)))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_those_of_the_weight(weight, bits):
    index = jnp.array([[3, 0], [39, 7]])
    found = quantized.rows_of(quantized.quantize(weight, bits), index)
    assert found.shape == (2, 2, weight.shape[1]) and found.dtype == weight.dtype
    np.testing.assert_allclose(found, whole(weight, bits)[0][np.asarray(index)], rtol=1e-6)


def test_a_quantized_weight_looks_like_the_weight():
    weight = jnp.ones((6, 32), jnp.bfloat16)
    for bits, nbytes in ((8, 6 * 32), (4, 6 * 16)):
        found = quantized.quantize(weight, bits)
        assert (found.shape, found.size, found.dtype) == ((6, 32), 192, jnp.bfloat16)
        assert found.values.nbytes == nbytes
