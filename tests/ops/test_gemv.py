"""GEMV kernels against exact sums, and as one loop over the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.ops.cpu import gemv


def compiled(function, *args):
    return ops.compiled(ops.Target("cpu"), jax.jit(function), *args)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "num_rows",
    [1, *(pytest.param(rows, marks=pytest.mark.slow) for rows in range(2, gemv.MOST_ROWS)), gemv.MOST_ROWS],
)
@pytest.mark.parametrize(
    "shape",
    [(40, 128), (24, 383), *(pytest.param(s, marks=pytest.mark.slow) for s in [(16, 2304), (8, 2368), (64, 4096)])],
)
def test_floats(dtype, num_rows, shape):
    sizes = (num_rows, shape[1]), shape
    x, weight = (jax.random.normal(jax.random.key(i), size, dtype) for i, size in enumerate(sizes))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert gemv.fits(shape[0])
    for function in (
        jax.jit(gemv.float_matmul),
        gemv.float_matmul,
        lambda *args: compiled(gemv.float_matmul, *args)(*args),
    ):
        np.testing.assert_allclose(function(x, weight), expected, atol=1e-5 * shape[1])


@pytest.mark.parametrize("num_outputs", [8, 28])
@pytest.mark.parametrize("num_rows", range(1, gemv.MOST_ROWS + 1))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_are_exact_at_the_ends_of_their_range(num_rows, dtype, num_outputs):
    rng, ends = np.random.default_rng(0), np.iinfo(dtype)
    zero_point = 128 if dtype == "uint8" else 0
    x = rng.choice([-128, -127, 0, 127], (num_rows, 16384))
    weight = rng.choice([ends.min, ends.max], (num_outputs, 16384))
    program = compiled(gemv.int8_matmul, jnp.asarray(x, jnp.int8), jnp.asarray(weight, dtype))
    found = program(jnp.asarray(x, jnp.int8), jnp.asarray(weight, dtype))
    np.testing.assert_array_equal(found, x @ (weight - zero_point).T)
    x[:], weight[:] = -128, ends.max
    found = program(jnp.asarray(x, jnp.int8), jnp.asarray(weight, dtype))
    np.testing.assert_array_equal(found, x @ (weight - zero_point).T)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_4_bits_are_exact_at_the_ends_of_their_range(group, num_rows):
    rng, width = np.random.default_rng(0), 16384
    for rows, numbers in ((rng.choice([-127, 127], (num_rows, width)), rng.choice([-7, 7], (8, width))), (127, 7)):
        rows, numbers = np.broadcast_to(rows, (num_rows, width)), np.broadcast_to(numbers, (8, width))
        low, high = np.split(numbers + 8, 2, axis=1)
        values, group_scale = jnp.asarray(low | high << 4, jnp.uint8), jnp.full((8, width // group), 18, jnp.int8)
        found = gemv.int4_matmul(jnp.asarray(rows, jnp.int8), values, group_scale)
        np.testing.assert_array_equal(found, 18 * (rows @ numbers.T))


@pytest.mark.parametrize("num_rows", range(1, gemv.MOST_ROWS + 1))
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "uint8", "int4"])
def test_it_is_one_loop_over_the_weight(num_rows, dtype):
    """Or it would be far slower than XLA's kernels: XLA splits a reduction of one array, and widens one it may."""
    width = 2048
    if dtype == "bfloat16":
        function, shapes = gemv.float_matmul, [((4096, width), dtype)]
    elif dtype == "int4":
        function, shapes = gemv.int4_matmul, [((4096, width // 2), "uint8"), ((4096, width // 128), "int8")]
    else:
        function, shapes = gemv.int8_matmul, [((4096, width), dtype)]
    x = jax.ShapeDtypeStruct((num_rows, width), "bfloat16" if dtype == "bfloat16" else "int8")
    program = compiled(function, x, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert program.memory_analysis().temp_size_in_bytes < 4096 * width / 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("num_rows", range(2, gemv.MOST_ROWS + 1))
def test_heads_are_one_loop_over_keys(dtype, num_rows):
    shapes = (3, 2, num_rows, 72), (3, 2, 304, 72)
    x, keys = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))
    expected = np.einsum("bkmd,bkfd->bkmf", *(np.asarray(part, np.float64) for part in (x, keys)))
    program = compiled(gemv.per_head_matmul, x, keys)
    np.testing.assert_allclose(program(x, keys), expected, atol=1e-4)
    assert "reduce-window" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * keys.nbytes
