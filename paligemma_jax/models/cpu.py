"""Products with weights, and with keys and values, and reductions, arranged for the CPU: how fast XLA is there depends
on which operand goes left, on the number of rows, and on its version. Elsewhere they are what they seem.

Which way is fast is measured, not guessed, once on each kind of processor (`measured`); only sums per head, reductions
and the turning by tiles have fixed bounds.

Axes: M rows, F outputs, D inputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from paligemma_jax import measured
from paligemma_jax.buckets import power_of_two
from paligemma_jax.models import few_rows

_FEW_ROWS = 64  # at most so many, reading the weight is most of a product
LARGE = 2**20  # numbers in a weight from which on that matters
_VERY_LARGE = 2**23  # numbers in a weight from which on many rows may be slow
_LARGE_PRODUCT = 2**20  # numbers in a product from which on it is turned by tiles
_TILE = 64  # outputs that are turned at once
_LARGE_HEADS = 2**16  # numbers in keys or values from which on the loop is worth starting
_SMALL = 2**15  # numbers that are reduced in a few microseconds
_MEASURED = 2**26  # bytes of the weight that is measured, which hardly any cache holds
_WIDTH = 2048  # inputs of that weight where any will do
_CLEARLY = 1.1  # gain that is no accident
_CLIFF = 3.0  # gain that says that the other way has no fast kernel for many rows
_NO_KERNEL = 5.0  # gain that says so for a few, whatever other work there was meanwhile

# What XLA needs at least for its fastest kernels; bfloat16 has one for four rows since jax 0.11.
_LEAST_ROWS = {"float32": 1, "int8": 2}
_LEAST_ROWS_HALF = 4 if jax.__version_info__ >= (0, 11) else 2
AT_ONCE = 16  # rows that XLA takes together where a half-precision weight is the left operand: fewer hardly cost less


def at_least(rows: jax.Array) -> jax.Array:
    """Rows [..., M, D] of the dtype of a product, with rows of zeros after them where it is far faster with more."""
    if jax.default_backend() != "cpu":
        return rows
    return _filled(rows, _LEAST_ROWS.get(rows.dtype.name, _LEAST_ROWS_HALF))


def _filled(rows: jax.Array, least: int) -> jax.Array:
    """Rows [..., M, D] with rows of zeros after them up to at least so many."""
    missing = least - rows.shape[-2]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, missing), (0, 0)]) if missing > 0 else rows


def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [M, D] times a weight [F, D] of the same dtype, summed in float32: [M, F]."""
    num_rows = len(rows)
    if sums_win(weight, num_rows):
        return few_rows.product(rows, weight)
    order = _weight_first if weight_first(weight, num_rows) else _rows_first
    return order(rows, weight)


def product_per_head(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Rows [B, K, M, D] times x [B, K, F, D], keys or values of the same head, summed in float32: [B, K, M, F]."""
    if sums_win_per_head(rows, x):
        return few_rows.product_per_head(rows, x)
    last_axes = (((3,), (3,)), ((0, 1), (0, 1)))
    y = lax.dot_general(at_least(rows), x, last_axes, preferred_element_type=jnp.float32)
    return y[:, :, : rows.shape[2]]


def whole_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times a weight of whole numbers, i8 or plus 128 as u8 [F, D]: i32 [M, F] of the numbers alone."""
    multiply = few_rows.whole_product if sums_win(weight, len(rows)) else kernel(weight.dtype)
    return without_offset(multiply(rows, weight), rows, weight.dtype)


def without_offset(product: jax.Array, rows: jax.Array, dtype: np.dtype) -> jax.Array:
    """Take off a product i32 [M, F] what the 128 in whole numbers have added if they are unsigned."""
    if dtype != jnp.uint8:
        return product
    # One loop for many rows too: XLA would make three kernels of it.
    return product - 128 * few_rows.total(rows.astype(jnp.int32))


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis of x [..., D], which is kept: [..., 1]."""
    return few_rows.total(x) if _is_small(x) else jnp.sum(x, axis=-1, keepdims=True)


def largest(x: jax.Array) -> jax.Array:
    """The largest over the last axis of x [..., D], which is kept: [..., 1]."""
    return few_rows.largest(x) if _is_small(x) else jnp.max(x, axis=-1, keepdims=True)


def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis of x [..., D]."""
    if not _is_small(x):
        return jax.nn.softmax(x, axis=-1)
    exponents = jnp.exp(x - few_rows.largest(lax.stop_gradient(x)))
    return exponents / few_rows.total(exponents)


def _is_small(x: jax.Array) -> bool:
    """Whether a reduction is best as one loop: cutting it up for the kernels of XLA would take longer than it does."""
    return jax.default_backend() == "cpu" and x.size <= _SMALL


def _rows_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """`product` with the rows as the left operand."""
    return _dot(at_least(rows), weight)[: len(rows)]


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The same with the weight as the left one."""
    if rows.dtype.itemsize == 2 and len(rows) <= _FEW_ROWS:
        filled = _filled(rows, max(AT_ONCE, power_of_two(len(rows))))
    else:
        filled = rows
    return _turned(_dot(weight, filled), len(rows))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of `a` [A, D] times rows of `b` [B, D], summed in float32, or in i32 if they are i8: [A, B]."""
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums)


@jax.jit
def _unsigned_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times a weight u8 [F, D]: i32 [M, F].

    Where `unsigned_is_fast`, XLA takes the weight as it lies. Of two signed operands it first shifts the left one or
    transposes the right one: few rows take 1.1 to 4 times as long so, many between 0.8 and 2 times
    (benchmarks/results/products.md).
    """
    return _turned(_dot_unsigned_p.bind(weight, at_least(rows)), len(rows))


def _turned(y: jax.Array, num_rows: int) -> jax.Array:
    """The first columns of a product [F, at least M] as rows [M, F]."""
    y = lax.optimization_barrier(y)[:, :num_rows]  # XLA would exchange the operands if it saw what becomes of it
    num_outputs = len(y)
    if y.size < _LARGE_PRODUCT or num_outputs % _TILE:
        return y.T
    # XLA would go through all of y for each row. Tiles that a cache holds are turned first, then put into order, and
    # that before anything is made of it, which would otherwise run over y in tiles.
    tiles = lax.optimization_barrier(jnp.swapaxes(y.reshape(-1, _TILE, num_rows), 1, 2))
    return lax.optimization_barrier(jnp.swapaxes(tiles, 0, 1).reshape(num_rows, num_outputs))


def kernel(dtype: np.dtype) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """XLA's own product of rows i8 with a weight of whole numbers, i8 or u8, as they are."""
    return _unsigned_first if dtype == jnp.uint8 else _rows_first


@functools.cache
def unsigned_is_fast() -> bool:
    """Whether XLA has a kernel for unsigned weights here, as where there are 8-bit dot-product instructions (VNNI).

    Without one it takes many times as long as for signed weights.
    """

    def calls() -> list[measured.Call]:
        rows, shape = jnp.zeros((4, _WIDTH), jnp.int8), (num_measured(_WIDTH), _WIDTH)
        signed, unsigned = (jnp.zeros(shape, dtype) for dtype in (jnp.int8, jnp.uint8))
        return [(kernel(weight.dtype), rows, weight) for weight in (signed, unsigned)]

    with jax.ensure_compile_time_eval():
        signed, unsigned = measured.remembered("unsigned weights", 2, calls)
    return unsigned < _NO_KERNEL * signed


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


def weight_first(weight: Any, num_rows: int) -> bool:
    """Whether rows times a weight [F, D], an array or its shape, are fastest with the weight as the left operand.

    The wrong order takes 2 to 4 times as long in float32, up to 6 in bfloat16 (benchmarks/results/products.md). Which
    one that is differs between processors, versions of XLA and widths.
    """
    few = num_rows <= _FEW_ROWS
    if jax.default_backend() != "cpu" or weight.size < (LARGE if few else _VERY_LARGE):
        return False
    right_few, right, left = _times(jnp.dtype(weight.dtype), weight.shape[1])[:3]
    return (right_few if num_rows <= few_rows.MOST else right) > left * (_CLEARLY if few else _CLIFF)


def sums_win(weight: Any, num_rows: int) -> bool:
    """Whether rows times a weight [F, D], an array or its shape, are fastest as the sums of `few_rows`.

    That is so in programs of `compiling.compiled`; elsewhere floats are added up one after the other.
    """
    num_outputs, width = weight.shape
    most = few_rows.MOST_WHOLE if weight.dtype == jnp.uint8 else few_rows.MOST
    if not mostly_reads(weight, num_rows, most) or not few_rows.fits(num_outputs) or not _has_sums(weight.dtype):
        return False
    if num_rows > few_rows.MOST:
        by_kernel, as_sums = _many_whole_times(width)
        return by_kernel > as_sums  # neither would be a loss where they are alike
    if jnp.issubdtype(weight.dtype, jnp.integer):
        return clearly_less(_whole_times(jnp.dtype(weight.dtype), width), num_rows)
    right_few, _, left, *sums = _times(jnp.dtype(weight.dtype), width)
    other = min(right_few, left)
    return clearly_less([other, other, *sums], num_rows)


def sums_win_per_head(rows: Any, x: Any) -> bool:
    """Whether rows [..., M, D] times x [..., F, D], arrays or their shapes, are faster as sums, as `sums_win` has it.

    XLA's kernels lay x out anew first, which takes longer than the sums of few rows.
    """
    few = 1 < rows.shape[-2] <= few_rows.MOST
    return jax.default_backend() == "cpu" and few and x.size >= _LARGE_HEADS and x.dtype.itemsize == 2


def mostly_reads(weight: Any, num_rows: int, most: int = few_rows.MOST) -> bool:
    """Whether `few_rows` takes so many rows, on a CPU, and a weight is so large that reading it is most of the work."""
    return jax.default_backend() == "cpu" and 0 < num_rows <= most and weight.size >= LARGE


def clearly_less(times: list[float], num_rows: int) -> bool:
    """Whether sums win for some rows: times are those of another way for one row and for most, and those of sums."""
    other_one, other_most, one, most = times
    return other_one > one * _CLEARLY if num_rows == 1 else other_most > most * _CLEARLY


def seconds(weight: Any, num_rows: int) -> float:
    """About how long rows times a weight [F, D] of 16-bit floats or 8-bit numbers take, an array or its shape.

    Of one row; or of more than `few_rows.MOST` and at most `AT_ONCE`, in 8 bits of `few_rows.MOST`.
    """
    width, dtype = weight.shape[1], jnp.dtype(weight.dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        least = least_of(_whole_times(dtype, width), num_rows)
    else:
        right_few, right, left, sums, _ = _times(dtype, width)
        least = min(right_few, left, sums) if num_rows == 1 else min(right, left)
    return least * weight.size / (width * num_measured(width * weight.dtype.itemsize))


def least_of(times: list[float], num_rows: int) -> float:
    """The faster way for one row, or `few_rows.MOST`, of those that `clearly_less` compares."""
    return min(times[num_rows > 1 :: 2])


def _has_sums(dtype: np.dtype) -> bool:
    return dtype != jnp.float32  # whose single row is fast in XLA's own kernel


def num_measured(row_bytes: int) -> int:
    """Outputs of the weight that is measured, a round number as those of networks are."""
    return max(1, _MEASURED // row_bytes // 64) * 64


@functools.cache
def _times(dtype: np.dtype, width: int) -> list[float]:
    """Seconds for a weight of this width on the right of `few_rows.MOST` rows and of `AT_ONCE`, on the left of so
    many, and as sums for one row and for `few_rows.MOST`, if it has them."""
    with_sums = _has_sums(dtype)

    def calls() -> list[measured.Call]:
        weight = jnp.zeros((num_measured(width * dtype.itemsize), width), dtype)
        rows = jnp.zeros((AT_ONCE, width), dtype)
        most = rows[: few_rows.MOST]
        right = [(_rows_first, most, weight), (_rows_first, rows, weight)]
        sums = [(few_rows.product, x, weight) for x in (rows[:1], most) if with_sums]
        return [*right, (_weight_first, rows, weight), *sums]

    with jax.ensure_compile_time_eval():  # the answer may be needed while a network is traced
        return measured.remembered(f"{dtype.name} weights of {width} inputs", 3 + 2 * with_sums, calls)


@functools.cache
def _whole_times(dtype: np.dtype, width: int) -> list[float]:
    """Seconds for one row of 8 bits and for `few_rows.MOST` times a weight of such ones in XLA's kernel and as sums."""

    def calls() -> list[measured.Call]:
        weight, most = jnp.zeros((num_measured(width), width), dtype), jnp.zeros((few_rows.MOST, width), jnp.int8)
        return [
            (multiply, rows, weight)
            for multiply in (kernel(dtype), few_rows.whole_product)
            for rows in (most[:1], most)
        ]

    with jax.ensure_compile_time_eval():
        return measured.remembered(f"8 bits times {dtype.name} weights of {width} inputs", 4, calls)


@functools.cache
def _many_whole_times(width: int) -> list[float]:
    """Seconds for `few_rows.MOST_WHOLE` rows of 8 bits times a weight of unsigned ones in XLA's kernel and as sums."""

    def calls() -> list[measured.Call]:
        weight = jnp.zeros((num_measured(width), width), jnp.uint8)
        rows = jnp.zeros((few_rows.MOST_WHOLE, width), jnp.int8)
        return [(multiply, rows, weight) for multiply in (_unsigned_first, few_rows.whole_product)]

    with jax.ensure_compile_time_eval():
        return measured.remembered(f"many rows of 8 bits times weights of {width} inputs", 2, calls)
