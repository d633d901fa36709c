"""XLA's own matmuls, however their operands are arranged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.ops.cpu import matmul
from paligemma_jax.ops.cpu.layout import CpuWeight, pad

KERNELS = ("reference", "x_first", "weight_first", "gemv")


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_every_kernel_gives_the_matmul_and_its_gradients(dtype, tolerance, padding):
    plain = jax.random.normal(jax.random.key(0), (40, 24), dtype)
    for num_rows in (1, 2, 4, 5, 17, 65):
        x = jax.random.normal(jax.random.key(num_rows), (num_rows, 24), dtype)

        def results(x, values):
            weights = [CpuWeight(pad(values, padding), 24, ((None, name),)) for name in KERNELS[: 3 + (num_rows <= 4)]]  # noqa: B023
            return [ops.linear(x[None], weight)[0] for weight in weights]

        expected = np.asarray(x, np.float64) @ np.asarray(plain, np.float64).T
        for found in jax.jit(results)(x, plain):
            np.testing.assert_allclose(found, expected, atol=10 * tolerance)
        if num_rows in (2, 17):
            dx, dw = jax.jacrev(lambda *args: jnp.stack([jnp.sum(jnp.square(y)) for y in results(*args)]), (0, 1))(
                x, plain
            )
            for found, exact in (
                (dx, 2 * expected @ np.asarray(plain, np.float64)),
                (dw, 2 * expected.T @ np.asarray(x, np.float64)),
            ):
                assert found.dtype == dtype
                for kernel in np.asarray(found, np.float64):
                    np.testing.assert_allclose(kernel, exact, atol=2 * tolerance * np.abs(exact).max())


def test_a_padded_weight_looks_like_the_weight():
    plain = jax.random.normal(jax.random.key(0), (40, 24), "bfloat16")
    weight = CpuWeight(pad(plain, 8), 24, ((4, "gemv"), (None, "x_first")))
    assert (weight.shape, weight.size, weight.ndim, weight.dtype) == (plain.shape, plain.size, 2, plain.dtype)
    index = jnp.array([[0, 39], [7, 7]])
    np.testing.assert_array_equal(ops.take_rows(weight, index), plain[index])
    np.testing.assert_array_equal(ops.dequantize(weight), plain)
    assert repr(weight) == "CpuWeight([40, 24], bfloat16, padded by 8, gemv up to 4 rows, x_first)"


@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_integers_are_exact_at_the_ends_of_their_range(num_rows):
    rng = np.random.default_rng(0)
    x, numbers = (rng.choice([-128, -127, -1, 0, 1, 127], (count, 64)) for count in (num_rows, 24))
    for values in (jnp.asarray(numbers + 128, jnp.uint8), jnp.asarray(numbers, jnp.int8)):
        np.testing.assert_array_equal(matmul.int8_matmul(jnp.asarray(x, jnp.int8), values), x @ numbers.T)


@pytest.mark.parametrize("num_outputs, in_tiles", [(64, False), (4032, True), (4033, False)])
def test_large_results_are_transposed_by_tiles(monkeypatch, num_outputs, in_tiles):
    monkeypatch.setattr(matmul, "_LARGE_RESULT", 2**12)
    y = np.random.default_rng(0).normal(size=(num_outputs, 16)).astype(np.float32)
    transpose = jax.jit(matmul._transposed, static_argnums=1)
    program = ops.compiled(ops.Target("cpu"), transpose, y, 3)
    np.testing.assert_array_equal(program(y), y.T[:3])
    assert ("[63,3,64]" in program.as_text()) == in_tiles


@pytest.mark.parametrize("dtype, rows, filled", [("bfloat16", 1, 16), ("float16", 17, 32), ("bfloat16", 65, 65)])
def test_few_rows_in_half_precision_are_filled_up(dtype, rows, filled):
    arrays = (jax.ShapeDtypeStruct((count, 24), dtype) for count in (rows, 40))
    text = jax.jit(matmul.weight_first).lower(*arrays).as_text()
    assert f"tensor<40x{filled}xf32>" in text


def test_4_bits_in_tiles_are_the_same_matmul(monkeypatch):
    weight = ops.quantize(jax.random.normal(jax.random.key(0), (500, 128)), "int4")  # the last tile overlaps another
    x = jax.random.normal(jax.random.key(1), (2, 128))
    monkeypatch.setattr(matmul, "_TILE_4", 64 * 128)
    for name in ("tiles", "tiles_unsigned"):
        found = ops.linear(x, dataclasses.replace(weight, kernels=((None, name),)))
        np.testing.assert_array_equal(found, ops.linear(x, weight))


def test_tiles_of_several_weights_share_their_room(monkeypatch):
    """XLA would make room for the results of all before the first is needed, if the loops began with plain zeros."""
    monkeypatch.setattr(matmul, "_TILE_4", 64 * 128)
    weight = ops.quantize(jax.random.normal(jax.random.key(0), (1024, 128)), "int4")
    weight, count = dataclasses.replace(weight, kernels=((None, "tiles"),)), 6
    back = jax.ShapeDtypeStruct((128, 1024), "float32")

    def network(x: jax.Array, weights: list[ops.Int4], back: jax.Array) -> jax.Array:
        for weight in weights:
            x = jnp.tanh(ops.linear(x, weight) @ back.T)
        return x

    shapes = jax.ShapeDtypeStruct((64, 128), "float32"), [weight] * count, back
    program = ops.compiled(ops.Target("cpu"), jax.jit(network), *shapes)
    assert program.memory_analysis().temp_size_in_bytes < 4 * 64 * 1024 * 4 < count * 64 * 1024 * 4
