"""Weights with some zeros after each row, for products with five to sixteen rows on CPU.

XLA's kernel for so few is slow where rows are whole pages, and 1.6 times as fast where they lie a little further apart
(benchmarks/results/products.md). It seems to read many of them side by side, whose numbers would share one set of a
first-level cache, of 8 to 12 lines.

Axes: F outputs, D inputs.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from paligemma_jax.models import cpu, few_rows

PADDING = 64  # bytes after a row: a line of the cache
_PAGE = 4096  # bytes after which the sets of a first-level cache repeat
_CLEARLY = 1.2  # gain that is worth the time and memory of laying a weight out anew


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded:
    """A weight [F, D] whose rows are followed by zeros.

    values: [F, D + padding].
    width: D.
    """

    values: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D), as if it were an array."""
        return self.values.shape[0], self.width

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def pad(self, rows: jax.Array) -> jax.Array:
        """Rows [M, D] that are to be multiplied with it, as wide as its values."""
        rows = jax.lax.optimization_barrier(rows)
        return jnp.pad(rows, ((0, 0), (0, self.values.shape[1] - self.width)))


def padding(weight: Any, num_rows: int) -> int:
    """How many zeros after each row of a weight [F, D], an array or its shape, pay for products with so many rows.

    That is measured (`cpu.seconds`) where it may be any.
    """
    itemsize = jnp.dtype(weight.dtype).itemsize
    if jax.default_backend() != "cpu" or not few_rows.MOST < num_rows <= cpu.AT_ONCE or itemsize != 2:
        return 0
    num_outputs, width = weight.shape
    if num_outputs * width < cpu.LARGE or width * itemsize % _PAGE:
        return 0
    count = PADDING // itemsize
    plain, padded = (jax.ShapeDtypeStruct((num_outputs, width + more), weight.dtype) for more in (0, count))
    return count if cpu.seconds(plain, num_rows) > _CLEARLY * cpu.seconds(padded, num_rows) else 0
