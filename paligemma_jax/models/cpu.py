"""Products with weights, arranged for the CPU: how fast XLA is there depends on which operand goes left, on the number
of rows, and on its version. Elsewhere they are what they seem.

Axes: M rows, F outputs, D inputs.
"""

import functools
import time
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

_FEW_ROWS = 16  # at most so many, a product is bound by reading the weight
_LARGE = 2**23  # numbers in a weight that no cache holds
_MEASURED = 2**24  # numbers in the weight that is measured
_WIDTH = 2048  # inputs of that weight where any will do
_TURNS = 5
_CLEARLY = 1.15  # gain that is no accident, so that a second process decides alike and finds its programs compiled
_CLIFF = 2.0  # gain that says that the other way has no fast kernel at all

# What XLA needs at least for its fastest kernels; bfloat16 has one for four rows since jax 0.11.
_LEAST_ROWS = {"float32": 1, "int8": 2}
_LEAST_ROWS_HALF = 4 if jax.__version_info__ >= (0, 11) else 2


def _at_least(rows: jax.Array) -> jax.Array:
    """Rows [M, D] of the dtype of a product, with rows of zeros after them where it is far faster with more."""
    if jax.default_backend() != "cpu":
        return rows
    missing = _LEAST_ROWS.get(rows.dtype.name, _LEAST_ROWS_HALF) - rows.shape[0]
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing > 0 else rows


def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [M, D] times a weight [F, D] of the same dtype, summed in float32: [M, F]."""
    num_rows = rows.shape[0]
    order = _weight_first if weight_first(weight, num_rows) else _dot
    return order(_at_least(rows), weight)[:num_rows]


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
    y = lax.optimization_barrier(_dot_unsigned_p.bind(weight, _at_least(rows))).T  # or XLA would turn it round
    return y[: len(rows)] - 128 * jnp.sum(rows, axis=1, keepdims=True, dtype=jnp.int32)


def signed_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times a weight of whole numbers i8 [F, D]: i32 [M, F]."""
    return _dot(_at_least(rows), weight)[: len(rows)]


@functools.cache
def unsigned_is_fast() -> bool:
    """Whether XLA has a kernel for unsigned weights here, as where there are 8-bit dot-product instructions (VNNI).

    Measured, once in a process: without one it takes many times as long as for signed weights.
    """
    with jax.ensure_compile_time_eval():
        rows, shape = jnp.zeros((4, _WIDTH), jnp.int8), (_MEASURED // _WIDTH, _WIDTH)
        signed, unsigned = _seconds(
            [(signed_product, rows, jnp.zeros(shape, jnp.int8)), (unsigned_product, rows, jnp.zeros(shape, jnp.uint8))]
        )
    return unsigned < _CLIFF * signed  # so that other work meanwhile cannot turn the answer


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


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as `_dot`; XLA would turn it round again if it saw what becomes of the product."""
    return lax.optimization_barrier(_dot(weight, rows)).T


def weight_first(weight: Any, num_rows: int) -> bool:
    """Whether rows times a weight [F, D], an array or its shape, are fastest with the weight as the left operand.

    The wrong order takes 2 to 4 times as long in float32, up to 6 in bfloat16 (benchmarks/results/products.md). Which
    one that is differs between processors, versions of XLA and widths: it is measured, once in a process for each width
    of a large weight.
    """
    if jax.default_backend() != "cpu" or weight.size < _LARGE:
        return False
    return _gain(jnp.dtype(weight.dtype), weight.shape[1]) > (_CLEARLY if num_rows <= _FEW_ROWS else _CLIFF)


def measure(params: Any) -> None:
    """Measure what will be asked about some parameters: now, because nothing else runs."""
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            weight_first(leaf, 1)


@functools.cache
def _gain(dtype: np.dtype, width: int) -> float:
    """How many times faster few rows are multiplied with a weight of this width on the left than on the right."""
    with jax.ensure_compile_time_eval():  # the answer may be needed while a network is traced
        weight, rows = jnp.zeros((_MEASURED // width, width), dtype), _at_least(jnp.zeros((2, width), dtype))
        right, left = _seconds([(_dot, rows, weight), (_weight_first, rows, weight)])
    return right / left


def _seconds(calls: list[tuple[Callable[..., jax.Array], jax.Array, jax.Array]]) -> list[float]:
    """The least time of each call, a function and its operands, when they take turns."""
    programs = [(jax.jit(function).lower(*operands).compile(), operands) for function, *operands in calls]
    least = [float("inf")] * len(programs)
    for _ in range(_TURNS):
        for i, (program, operands) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            least[i] = min(least[i], time.perf_counter() - start)
    return least
