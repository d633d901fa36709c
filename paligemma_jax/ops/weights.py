"""Weights and what a network does with them: multiply, look rows up.

A plain array [F, D] is always a weight, and its matmul the reference. The other types are frozen registered dataclasses
that multiply themselves, by the kernel that `prepare` has chosen for the number of rows. A quantized weight [F, D] is
`scale[f] * group_scale[f, g] * integer[f, d]`; 8 bits have no group scales. Group scales are small integers, so that
what is multiplied fits 8 bits in both formats.

Axes: M rows, F outputs, D inputs, G groups of inputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.ops.cpu import gemv, matmul
from paligemma_jax.ops.kernels import REFERENCE, Kernels, Sized, describe, kernel_for

_MOST_8 = 127  # largest size of an integer in 8 bits
_ZERO_POINT = 8  # of the 4-bit numbers
_static = {"metadata": {"static": True}}


# An array [F, D], or what stands in for one and has
#   shape, size, ndim, and dtype, of the numbers that it stands for,
#   matmul(x [M, D]) -> f32 [M, F], differentiable with respect to x,
#   take(index [...]) -> rows [..., D] of dtype,
#   dequantize() -> the plain array.
Weight = Any


def linear(x: jax.Array, weight: Weight) -> jax.Array:
    """Activations [..., D] times a weight in file orientation [F, D]: float32 [..., F].

    Activations take the weight's dtype, or 8 bits where the weight asks for it; sums are float32.
    """
    if is_weight(weight):
        y = weight.matmul(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], weight.shape[0])
    last_axes = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(weight.dtype), weight, last_axes, preferred_element_type=jnp.float32)


def take_rows(weight: Weight, index: jax.Array) -> jax.Array:
    """Rows [..., D] of a weight at an index [...], as numbers of its dtype."""
    return weight.take(index) if is_weight(weight) else jnp.take(weight, index, axis=0)


def dequantize(weight: Weight) -> jax.Array:
    """The plain array [F, D] that a weight stands for; a plain one as it is."""
    return weight.dequantize() if is_weight(weight) else weight


def is_weight(x: Any) -> bool:
    """Whether a node of a parameter tree is a weight of a type of its own: the `is_leaf` of such trees."""
    return hasattr(x, "dequantize")


def materialize(x: Any) -> Any:
    """An array, or a tree of them, computed once and kept as it is for all that read it.

    XLA may otherwise compute a cheap-looking value anew for each reader (logits: a whole matmul with the table), with
    other roundings, or move work on a constant of a loop out of it (a table as float32, twice its size).
    """
    return lax.optimization_barrier(x)


class _Quantized(Sized):
    """What both formats share."""

    def dequantize(self) -> jax.Array:
        numbers = self.integers().astype(jnp.float32) * self.scale[:, None]
        return numbers.astype(self.dtype)

    def take(self, index: jax.Array) -> jax.Array:
        chosen = jax.tree.map(lambda part: jnp.take(part, index.reshape(-1), axis=0), self)
        return chosen.dequantize().reshape(*index.shape, -1)

    def matmul(self, x: jax.Array) -> jax.Array:
        return _unscaled_matmul(x, self) * self.scale[None]

    def __repr__(self) -> str:
        activations = "8-bit activations" if self.quantize_activations else "activations as they are"
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {activations}, {describe(self.kernels)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Int8(_Quantized):
    """A weight [F, D] in 8 bits.

    values: integers i8 [F, D], or with a zero point of 128 as u8 where that multiplies faster (VNNI).
    scale: f32 [F].
    dtype: of the numbers that it stands for.
    quantize_activations: they take 8 bits too, one scale per row; else the integers take `dtype`.
    """

    values: jax.Array
    scale: jax.Array
    dtype: jnp.dtype = dataclasses.field(**_static)
    quantize_activations: bool = dataclasses.field(default=True, **_static)
    kernels: Kernels = dataclasses.field(default=(), **_static)

    quantization = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def integers(self) -> jax.Array:
        """i8 [F, D], which `scale` makes weights of."""
        return with_zero_point(self.values, jnp.int8)

    def integer_matmul(self, x: jax.Array) -> jax.Array:
        """Rows i8 [M, D] times the integers: i32 [M, F]."""
        kernel = kernel_for(self.kernels, len(x))
        if kernel == REFERENCE:
            return matmul.dot(x, self.integers())
        return {"gemv": gemv.int8_matmul, "dot": matmul.int8_matmul}[kernel](x, self.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Int4(_Quantized):
    """A weight [F, D] in 4 bits, multiplied with activations in 8 bits, one scale per row.

    values: u8 [F, D / 2], two numbers plus 8 each: input d in the low half, input d + D / 2 in the high one.
    scale: f32 [F].
    group_scale: i8 [F, G], a factor for each group of inputs.
    dtype: of the numbers that it stands for.
    """

    values: jax.Array
    scale: jax.Array
    group_scale: jax.Array
    dtype: jnp.dtype = dataclasses.field(**_static)
    kernels: Kernels = dataclasses.field(default=(), **_static)

    quantization = "int4"
    quantize_activations = True

    @property
    def shape(self) -> tuple[int, int]:
        num_outputs, half = self.values.shape
        return num_outputs, 2 * half

    def halves(self) -> list[jax.Array]:
        """The integers times their group scales of the left and the right half of the inputs: i8 [F, D / 2] each."""
        numbers = self.values & 15, self.values >> 4
        scales = jnp.split(self.group_scale, 2, axis=1)

        def half(numbers: jax.Array, scale: jax.Array) -> jax.Array:
            grouped = (numbers.astype(jnp.int8) - jnp.int8(_ZERO_POINT)).reshape(*scale.shape, -1)
            return (grouped * scale[:, :, None]).reshape(numbers.shape)

        return [half(*pair) for pair in zip(numbers, scales, strict=True)]

    def integers(self) -> jax.Array:
        """i8 [F, D], which `scale` makes weights of."""
        return jnp.concatenate(self.halves(), axis=1)

    def integer_matmul(self, x: jax.Array) -> jax.Array:
        """Rows i8 [M, D] times the integers: i32 [M, F]."""
        kernel = kernel_for(self.kernels, len(x))
        if kernel == "gemv":
            return gemv.int4_matmul(x, self.values, self.group_scale)
        if kernel == REFERENCE:
            return self.dot_halves(x, matmul.dot)
        dtype = jnp.uint8 if kernel == "tiles_unsigned" else jnp.int8

        def dot(x: jax.Array, half: jax.Array) -> jax.Array:
            return matmul.int8_matmul(x, with_zero_point(half, dtype))

        return matmul.by_tiles(x, self, lambda x, tile: tile.dot_halves(x, dot))

    def dot_halves(self, x: jax.Array, dot: Any) -> jax.Array:
        """The same by a matmul of each half: putting them together would take longer than multiplying them."""
        pairs = zip(jnp.split(x, 2, axis=1), self.halves(), strict=True)
        left, right = (dot(*pair) for pair in pairs)
        return left + right


def with_zero_point(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Integers, i8 or u8 with a zero point of 128, in the other form; the array itself if it is in this one already."""
    if values.dtype == dtype:
        return values
    return lax.bitcast_convert_type(lax.bitcast_convert_type(values, jnp.uint8) ^ jnp.uint8(128), dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations [M, D] as i8 and a scale f32 [M, 1] of each row."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / _MOST_8
    return jnp.round(x / scale).astype(jnp.int8), scale


@jax.custom_vjp
def _unscaled_matmul(x: jax.Array, weight: Int8 | Int4) -> jax.Array:
    """Activations [M, D] times the integers of a weight: float32 [M, F]; sums of quantized activations are exact."""
    if weight.quantize_activations:
        rounded, scale = quantize_rows(x)
        return weight.integer_matmul(rounded).astype(jnp.float32) * scale
    x, weight = materialize((x, weight))  # or the weights of all layers would be widened at once
    return linear(x.astype(weight.dtype), weight.integers().astype(weight.dtype))


def _forward(x: jax.Array, weight: Int8 | Int4) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    return _unscaled_matmul(x, weight), (weight, jnp.zeros(0, x.dtype))


def _backward(saved: tuple[Any, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    """Straight through the rounding of activations."""
    weight, like = saved
    integers = materialize(weight).integers().astype(weight.dtype)
    dx = lax.dot(cotangent.astype(weight.dtype), integers, preferred_element_type=jnp.float32)
    return dx.astype(like.dtype), None  # the integers have no gradient; that of `scale` arises outside


_unscaled_matmul.defvjp(_forward, _backward)
