"""Plain weights of floats with the kernels that multiply them on a CPU, and perhaps padding after each row.

Row padding: XLA's kernel for 5 to 16 rows is slow where rows are whole pages. It reads many of them side by side, whose
numbers would share one set of a first-level cache, of 8 to 12 lines; 64 bytes of zeros after each row set them apart. A
step of 16 answers of PaliGemma 1 3B in bfloat16 takes 318 ms instead of 533 so (benchmarks/results/operations.md, a Zen
4). Since jax 0.9; delete when the two columns "16 bits" and "padded" of products.md agree.

Axes: M rows, F outputs, D inputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.ops.cpu import gemv, matmul
from paligemma_jax.ops.kernels import REFERENCE, Kernels, Sized, describe, kernel_for

PADDING_BYTES = 64  # after a row: a line of the cache
PAGE_BYTES = 4096  # after which the sets of a first-level cache repeat

_KERNELS = {
    "gemv": gemv.float_matmul,
    "x_first": matmul.x_first,
    "weight_first": matmul.weight_first,
    REFERENCE: matmul.dot,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class CpuWeight(Sized):
    """A weight [F, D] of floats.

    values: [F, D], or with zeros after each row [F, D + padding].
    width: D.
    """

    values: jax.Array
    width: int = dataclasses.field(metadata={"static": True})
    kernels: Kernels = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.width

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @property
    def padding(self) -> int:
        """Zeros after each row."""
        return self.values.shape[1] - self.width

    def matmul(self, x: jax.Array) -> jax.Array:
        """Activations [M, D] times the weight: float32 [M, F]."""
        return _matmul(x, self)

    def take(self, index: jax.Array) -> jax.Array:
        # Tied to the index, or XLA would make a float32 copy of the whole table ahead of a loop over tokens.
        values, index = lax.optimization_barrier((self.values, index))
        return jnp.take(values, index, axis=0)[..., : self.width]

    def dequantize(self) -> jax.Array:
        return self.values[:, : self.width] if self.padding else self.values

    def __repr__(self) -> str:
        padded = f", padded by {self.padding}" if self.padding else ""
        return f"CpuWeight({list(self.shape)}, {self.dtype}{padded}, {describe(self.kernels)})"


def pad(values: jax.Array, count: int) -> jax.Array:
    """Rows [F, D] with so many zeros after each."""
    return jnp.pad(values, ((0, 0), (0, count)))


@jax.custom_vjp
def _matmul(x: jax.Array, weight: CpuWeight) -> jax.Array:
    x = x.astype(weight.dtype)
    if weight.padding:
        x = pad(lax.optimization_barrier(x), weight.padding)
    return _KERNELS[kernel_for(weight.kernels, len(x))](x, weight.values)


def _forward(x: jax.Array, weight: CpuWeight) -> tuple[jax.Array, tuple[jax.Array, CpuWeight]]:
    return _matmul(x, weight), (x, weight)


def _backward(saved: tuple[jax.Array, CpuWeight], dy: jax.Array) -> tuple[jax.Array, CpuWeight]:
    """Gradients of a plain matmul: JAX would derive a variadic reduce by halving its arrays again and again."""
    x, weight = saved
    dx = jnp.matmul(dy, weight.dequantize(), preferred_element_type=jnp.float32).astype(x.dtype)
    dw = jnp.matmul(dy.T, x.astype(weight.dtype), preferred_element_type=jnp.float32).astype(weight.dtype)
    return dx, dataclasses.replace(weight, values=pad(dw, weight.padding) if weight.padding else dw)


_matmul.defvjp(_forward, _backward)
