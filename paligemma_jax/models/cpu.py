"""Products of few rows on CPU: which operand XLA multiplies fastest as the left one differs between processors.

Axes: M rows, F outputs, D inputs.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LARGE = 2**23  # numbers in a weight that no cache holds
_SHAPE = 8192, 2048  # F, D of what is measured
_TURNS = 5


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of `a` [A, D] times rows of `b` [B, D], summed in float32: [A, B]."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def weight_first(weight: Any) -> bool:
    """Whether few rows times a weight [F, D], an array or its shape, are fastest with the weight as the left operand.

    With bfloat16 that takes 1.6 times as long as the other order on a Zen 4 core (benchmarks/results/products.md), and
    processors differ, so it is measured, once in a process, where a large weight makes it matter.
    """
    return weight.size < _LARGE or _measured(jnp.dtype(weight.dtype))


def measure(params: Any) -> None:
    """Measure what `weight_first` will be asked about some parameters: now, because nothing else runs."""
    for leaf in jax.tree.leaves(params):
        if jax.default_backend() == "cpu" and leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            weight_first(leaf)


@functools.cache
def _measured(dtype: np.dtype) -> bool:
    with jax.ensure_compile_time_eval():  # the answer may be needed while a network is traced
        weight, rows = jnp.zeros(_SHAPE, dtype), jnp.zeros((2, _SHAPE[1]), dtype)
        orders = {True: (weight, rows), False: (rows, weight)}
        programs = {first: jax.jit(product).lower(*pair).compile() for first, pair in orders.items()}
        seconds = {first: float("inf") for first in orders}
        for _ in range(_TURNS):
            for first, pair in orders.items():
                start = time.perf_counter()
                jax.block_until_ready(programs[first](*pair))
                seconds[first] = min(seconds[first], time.perf_counter() - start)
    return seconds[True] <= seconds[False]
