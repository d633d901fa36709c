"""Products on CPU: how fast XLA is depends on which operand goes left, on the number of rows, and on its version.

Axes: M rows, F outputs, D inputs.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FEW_ROWS = 16  # at most so many, a product is bound by reading the weight
_LARGE = 2**23  # numbers in a weight that no cache holds
_MEASURED = 2**24  # numbers in the weight that is measured
_TURNS = 5
_CLEARLY = 1.15  # gain that is no accident, so that a second process decides alike and finds its programs compiled
_CLIFF = 2.0  # gain with few rows that says that the other order has no fast kernel for this width at all

# What XLA needs at least for its fast kernels; bfloat16 has a faster one for four rows since jax 0.11.
_LEAST_ROWS = {"float32": 1, "int8": 2}
_LEAST_ROWS_HALF = 4 if jax.__version_info__ >= (0, 11) else 2
_LONG = 4096  # inputs of an int8 product from which on more pieces are worth it


def _at_least(rows: jax.Array) -> jax.Array:
    """Rows [M, D] of the dtype of a product, with rows of zeros after them where it is far faster with more."""
    missing = _LEAST_ROWS.get(rows.dtype.name, _LEAST_ROWS_HALF) - rows.shape[0]
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing > 0 else rows


def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [M, D] times a weight [F, D] of the same dtype, summed in float32: [M, F]."""
    num_rows = rows.shape[0]
    order = _weight_first if weight_first(weight, num_rows) else dot
    return order(_at_least(rows), weight)[:num_rows]


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of `a` [A, D] times rows of `b` [B, D], summed in float32: [A, B]."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def whole_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times a weight i8 [F, D], on any device: i32 [M, F].

    On CPU a lone row is cut in pieces that act as rows, times the pieces of the weight's: that reads the weight once as
    well, as two rows would, with shorter sums, of which those of fitting pieces count.
    """
    (num_rows, width), num_outputs = rows.shape, len(weight)
    if jax.default_backend() != "cpu" or num_rows > 1:
        return _whole_dot(rows, weight)
    count = 2 if width <= _LONG else 4
    if width % count:
        return _whole_dot(_at_least(rows), weight)[:1]
    y = _whole_dot(rows.reshape(count, -1), weight.reshape(num_outputs * count, -1)).reshape(count, num_outputs, count)
    return sum(y[i, :, i] for i in range(count))[None]


def _whole_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as `dot`; XLA would turn it round again if it saw what becomes of the product."""
    return lax.optimization_barrier(dot(weight, rows)).T


def weight_first(weight: Any, num_rows: int) -> bool:
    """Whether rows times a weight [F, D], an array or its shape, are fastest with the weight as the left operand.

    The wrong order takes 2.4 times as long in float32 and up to 6 times in bfloat16 (benchmarks/results/products.md);
    which one that is differs between processors, versions of XLA and widths, so it is measured, once in a process for
    each width of a large weight.
    """
    if weight.size < _LARGE:
        return False
    return _gain(jnp.dtype(weight.dtype), weight.shape[1]) > (_CLEARLY if num_rows <= FEW_ROWS else _CLIFF)


def measure(params: Any) -> None:
    """Measure what `weight_first` will be asked about some parameters: now, because nothing else runs."""
    for leaf in jax.tree.leaves(params):
        if jax.default_backend() == "cpu" and leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            weight_first(leaf, 1)


@functools.cache
def _gain(dtype: np.dtype, width: int) -> float:
    """How many times faster few rows are multiplied with a weight of this width on the left than on the right."""
    with jax.ensure_compile_time_eval():  # the answer may be needed while a network is traced
        weight, rows = jnp.zeros((_MEASURED // width, width), dtype), _at_least(jnp.zeros((2, width), dtype))
        programs = [jax.jit(order).lower(rows, weight).compile() for order in (dot, _weight_first)]
        seconds = [float("inf")] * 2
        for _ in range(_TURNS):
            for i, program in enumerate(programs):
                start = time.perf_counter()
                jax.block_until_ready(program(rows, weight))
                seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds[0] / seconds[1]
