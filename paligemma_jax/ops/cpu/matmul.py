"""Matmuls by XLA's own kernels on CPU, with operands arranged so that it takes the fast ones.

How fast they are depends on which operand goes left, on the number of rows and on the version: the wrong order takes 2
to 4 times as long in float32, up to 6 in bfloat16 (benchmarks/results/products.md). `autotune` measures which is which.
Delete an order when it wins nowhere any more.

Axes: M rows, F outputs, D inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from paligemma_jax.buckets import power_of_two

FEW_ROWS = 64  # at most so many, reading the weight is most of the work
ROWS_AT_ONCE = 16  # rows that XLA takes together where a 16-bit weight is the left operand: fewer hardly cost less
_LARGE_RESULT = 2**20  # numbers in a result from which on it is transposed by tiles
_TILE = 64  # outputs that are transposed at once
_TILE_4 = 1 << 22  # 4-bit numbers that are unpacked at once, so that they stay in a cache

# What XLA needs at least for its fastest kernels; bfloat16 has one for four rows since jax 0.11.
_LEAST_ROWS = {"float32": 1, "int8": 2}
_LEAST_ROWS_HALF = 4 if jax.__version_info__ >= (0, 11) else 2


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [M, D] times rows [F, D] of the same dtype: float32 [M, F], or i32 if they are i8."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=sums)


def x_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`dot` with rows of zeros after x where XLA is far faster with more.

    One row of bfloat16 would take a hundred times as long as two. Delete when XLA has a kernel for one row.
    """
    return dot(pad_rows(x), weight)[: len(x)]


def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`dot` with the weight as the left operand.

    16 rows of bfloat16 times a weight [2048, 16384] take 6.6 ms instead of 29 so, of float32 6.4 instead of 15
    (products.md, a Zen 4, jax 0.12): a step of 16 answers is made of such matmuls.
    """
    few = x.dtype.itemsize == 2 and len(x) <= FEW_ROWS
    filled = _filled(x, max(ROWS_AT_ONCE, power_of_two(len(x)))) if few else x
    return _transposed(dot(weight, filled), len(x))


def int8_matmul(x: jax.Array, values: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times integers, i8 or u8 with a zero point of 128 [F, D]: i32 [M, F]."""
    if values.dtype == jnp.int8:
        return x_first(x, values)
    return unsigned_matmul(x, values) - 128 * jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32)


@jax.jit
def unsigned_matmul(x: jax.Array, values: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times u8 [F, D] as they are: i32 [M, F].

    With VNNI, XLA takes an unsigned weight as it lies. Of two signed operands it first shifts the left one or
    transposes the right one: few rows take 1.1 to 4 times as long so, many between 0.8 and 2 times
    (benchmarks/results/products.md). Delete when signed operands are as fast.
    """
    return _transposed(_dot_unsigned_p.bind(values, pad_rows(x)), len(x))


def pad_rows(x: jax.Array) -> jax.Array:
    """Rows [..., M, D] with rows of zeros after them where XLA is far faster with more."""
    return _filled(x, _LEAST_ROWS.get(x.dtype.name, _LEAST_ROWS_HALF))


def by_tiles(x: jax.Array, weight: Any, multiply: Callable[[jax.Array, Any], jax.Array]) -> jax.Array:
    """`multiply` rows i8 [M, D] by a weight [F, D] in 4 bits, some outputs at a time: i32 [M, F].

    So few unpacked weights are about at once that a cache holds them, and a program needs no room for all of them: XLA
    would unpack those of every layer before the first matmul. Delete when it multiplies 4-bit numbers.
    """
    num_outputs = weight.shape[0]
    count = -(-weight.size // _TILE_4)
    if count == 1:
        return multiply(*lax.optimization_barrier((x, weight)))  # or those of all layers are unpacked at once
    size = min(num_outputs, 16 * -(-num_outputs // (16 * count)))

    def write_tile(i: jax.Array, y: jax.Array) -> jax.Array:
        first = jnp.minimum(i * size, num_outputs - size)  # the last tile may compute some outputs again
        tile = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, first, size), weight)
        return lax.dynamic_update_slice(y, multiply(x, tile), (0, first))

    # Zeros made from x, which is never so small, or XLA would make room for the results of all layers at once.
    start = jnp.broadcast_to((x[:, :1] < -127).astype(jnp.int32), (len(x), num_outputs))
    return lax.fori_loop(0, -(-num_outputs // size), write_tile, start)


def _filled(x: jax.Array, least: int) -> jax.Array:
    """Rows [..., M, D] with rows of zeros after them up to at least so many."""
    missing = least - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing > 0 else x


def _transposed(y: jax.Array, num_rows: int) -> jax.Array:
    """The first columns of a result [F, at least M] as rows [M, F]."""
    y = lax.optimization_barrier(y)[:, :num_rows]  # XLA would exchange the operands if it saw what becomes of it
    num_outputs = len(y)
    if y.size < _LARGE_RESULT or num_outputs % _TILE:
        return y.T
    # XLA would go through all of y for each row. Tiles that a cache holds are transposed first, then put into order,
    # and that before anything is made of it, which would otherwise run over y in tiles.
    tiles = lax.optimization_barrier(jnp.swapaxes(y.reshape(-1, _TILE, num_rows), 1, 2))
    return lax.optimization_barrier(jnp.swapaxes(tiles, 0, 1).reshape(num_rows, num_outputs))


# lax.dot_general would widen operands of different dtypes before it multiplies them.
_dot_unsigned_p = Primitive("dot_unsigned")


@_dot_unsigned_p.def_abstract_eval
def _(a: jax.core.ShapedArray, b: jax.core.ShapedArray) -> jax.core.ShapedArray:
    return jax.core.ShapedArray((a.shape[0], b.shape[0]), jnp.int32)


def _lower_dot_unsigned(context: mlir.LoweringRuleContext, a: ir.Value, b: ir.Value) -> list[ir.Value]:
    [out] = context.avals_out
    sums = ir.RankedTensorType.get(out.shape, ir.IntegerType.get_signless(32))
    last_axes = stablehlo.DotDimensionNumbers.get([], [], [1], [1])
    return [stablehlo.dot_general(sums, a, b, last_axes)]


mlir.register_lowering(_dot_unsigned_p, _lower_dot_unsigned)
