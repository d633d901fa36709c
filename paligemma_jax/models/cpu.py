"""Products with weights, arranged for the CPU: how fast XLA is there depends on which operand goes left, on the number
of rows, and on its version. Elsewhere they are what they seem.

Which way is fast is measured, not guessed, once on each kind of processor (`measured`).

Axes: M rows, F outputs, D inputs.
"""

import functools
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
from paligemma_jax.models import one_row

_FEW_ROWS = 64  # at most so many, reading the weight is most of a product
_LARGE = 2**20  # numbers in a weight from which on that matters
_VERY_LARGE = 2**23  # numbers in a weight from which on many rows may be slow
_FEWEST = 4  # rows up to which the time of so many decides, above it that of `_AT_ONCE`
_MEASURED = 2**26  # bytes of the weight that is measured, which hardly any cache holds
_WIDTH = 2048  # inputs of that weight where any will do
_CLEARLY = 1.1  # gain that is no accident
_WORTH_ITS_LENGTH = 1.25  # gain that a longer program must have: it takes memory, and time to load
_CLIFF = 3.0  # gain that says that the other way has no fast kernel for many rows
_NO_KERNEL = 5.0  # gain that says so for a few, whatever other work there was meanwhile

# What XLA needs at least for its fastest kernels; bfloat16 has one for four rows since jax 0.11.
_LEAST_ROWS = {"float32": 1, "int8": 2}
_LEAST_ROWS_HALF = 4 if jax.__version_info__ >= (0, 11) else 2
_AT_ONCE = 16  # rows that XLA takes together where a half-precision weight is the left operand: fewer hardly cost less


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
    if num_rows == 1 and (form := loop(weight)):
        return one_row.product(rows[0], weight, form)[None]
    order = _weight_first if weight_first(weight, num_rows) else _rows_first
    return order(rows, weight)


def _rows_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """`product` with the rows as the left operand."""
    return _dot(at_least(rows), weight)[: len(rows)]


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The same with the weight as the left one; XLA would turn it round again if it saw what becomes of it."""
    if rows.dtype.itemsize == 2 and len(rows) <= _FEW_ROWS:
        filled = _filled(rows, max(_AT_ONCE, power_of_two(len(rows))))
    else:
        filled = rows
    return lax.optimization_barrier(_dot(weight, filled)).T[: len(rows)]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of `a` [A, D] times rows of `b` [B, D], summed in float32, or in i32 if they are i8: [A, B]."""
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums)


@jax.jit
def unsigned_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times a weight of whole numbers plus 128, u8 [F, D]: what the numbers alone give, i32 [M, F].

    Where `unsigned_is_fast`, XLA takes the weight as it lies. Of two signed operands it first shifts the left one or
    transposes the right one: few rows take 1.1 to 4 times as long so, many between 0.8 and 2 times
    (benchmarks/results/products.md).
    """
    y = lax.optimization_barrier(_dot_unsigned_p.bind(weight, at_least(rows))).T  # or XLA would turn it round
    return y[: len(rows)] - 128 * jnp.sum(rows, axis=1, keepdims=True, dtype=jnp.int32)


def signed_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times a weight of whole numbers i8 [F, D]: i32 [M, F]."""
    return _dot(at_least(rows), weight)[: len(rows)]


@functools.cache
def unsigned_is_fast() -> bool:
    """Whether XLA has a kernel for unsigned weights here, as where there are 8-bit dot-product instructions (VNNI).

    Without one it takes many times as long as for signed weights.
    """

    def calls() -> list[measured.Call]:
        rows, shape = jnp.zeros((4, _WIDTH), jnp.int8), (_num_measured(_WIDTH), _WIDTH)
        signed, unsigned = (jnp.zeros(shape, dtype) for dtype in (jnp.int8, jnp.uint8))
        return [(signed_product, rows, signed), (unsigned_product, rows, unsigned)]

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
    if jax.default_backend() != "cpu" or weight.size < (_LARGE if few else _VERY_LARGE):
        return False
    right_few, right, left = _times(jnp.dtype(weight.dtype), weight.shape[1])[:3]
    return (right_few if num_rows <= _FEWEST else right) > left * (_CLEARLY if few else _CLIFF)


def loop(weight: Any) -> one_row.Form | None:
    """The loop that is the fastest way for a single row times a weight [F, D], an array or its shape, if one is."""
    if jax.default_backend() != "cpu" or weight.size < _LARGE or not _has_loop(weight.dtype, weight.shape[1]):
        return None
    width = weight.shape[1]
    if weight.dtype == jnp.int8:
        other, *loops = _signed_times(width)
    else:
        right_few, _, left, *loops = _times(jnp.dtype(weight.dtype), width)
        other = min(right_few, left)
    fastest = min(loops)
    return one_row.forms(width)[loops.index(fastest)] if other > fastest * _CLEARLY else None


def packed_loop(values: Any, multiplier: Any) -> one_row.Form | None:
    """The fastest loop for a single row times a weight in 4 bits, see `one_row.packed_product`, if it has one."""
    width, num_groups = 2 * values.shape[1], multiplier.shape[1]
    large = width * values.shape[0] >= _LARGE
    if jax.default_backend() != "cpu" or not large or not one_row.fits_packed(width, num_groups):
        return None
    short, long = _packed_times(width, num_groups)
    return one_row.PACKED_FORMS[short > long * _WORTH_ITS_LENGTH]


def _has_loop(dtype: np.dtype, width: int) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16, jnp.int8) and one_row.fits(width)


def _num_measured(row_bytes: int) -> int:
    """Outputs of the weight that is measured, a round number as those of networks are."""
    return max(1, _MEASURED // row_bytes // 64) * 64


@functools.cache
def _times(dtype: np.dtype, width: int) -> list[float]:
    """Seconds for a weight of this width on the right of `_FEWEST` and of `_AT_ONCE` rows, on the left of so many, and
    for one row in each form of a loop, if there are any."""
    forms = one_row.forms(width) if _has_loop(dtype, width) else ()

    def calls() -> list[measured.Call]:
        weight = jnp.zeros((_num_measured(width * dtype.itemsize), width), dtype)
        rows = jnp.zeros((_AT_ONCE, width), dtype)
        right = [(_rows_first, rows[:_FEWEST], weight), (_rows_first, rows, weight)]
        return [*right, (_weight_first, rows, weight), *_loops(forms, rows[0], weight)]

    with jax.ensure_compile_time_eval():  # the answer may be needed while a network is traced
        return measured.remembered(f"{dtype.name} weights of {width} inputs", 3 + len(forms), calls)


@functools.cache
def _signed_times(width: int) -> list[float]:
    """Seconds for one row of 8 bits times a weight of such ones as `signed_product`, and in each form of a loop."""
    forms = one_row.forms(width)

    def calls() -> list[measured.Call]:
        weight, row = jnp.zeros((_num_measured(width), width), jnp.int8), jnp.zeros((1, width), jnp.int8)
        return [(signed_product, row, weight), *_loops(forms, row[0], weight)]

    with jax.ensure_compile_time_eval():
        return measured.remembered(f"one row times int8 weights of {width} inputs", 1 + len(forms), calls)


def _loops(forms: tuple[one_row.Form, ...], row: jax.Array, weight: jax.Array) -> list[measured.Call]:
    return [(functools.partial(one_row.product, form=form), row, weight) for form in forms]


@functools.cache
def _packed_times(width: int, num_groups: int) -> list[float]:
    """Seconds for one row times a weight in 4 bits in each form of a loop."""

    def calls() -> list[measured.Call]:
        num_outputs = _num_measured(width // 2)
        values = jnp.zeros((num_outputs, width // 2), jnp.uint8)
        arrays = (jnp.zeros(width), values, jnp.zeros((num_outputs, num_groups), jnp.int8))
        return [(functools.partial(one_row.packed_product, form=form), *arrays) for form in one_row.PACKED_FORMS]

    with jax.ensure_compile_time_eval():
        name = f"4 bits of {width} inputs in {num_groups} groups"
        return measured.remembered(name, len(one_row.PACKED_FORMS), calls)
