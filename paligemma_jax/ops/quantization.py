"""Weights to 8 and 4 bits.

Axes: F outputs, D inputs, G groups of inputs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from paligemma_jax.ops.weights import Int4, Int8

FORMATS = ("int8", "int4")

_MOST_8 = 127
_MOST_4 = 7
_MOST_GROUP_SCALE = _MOST_8 // _MOST_4
_GROUP = 128  # inputs that share a group scale, fewer where half the width is no multiple of it


def quantize(weight: jax.Array, format: str, quantize_activations: bool = True) -> Int8 | Int4:
    """Round a weight [F, D] to the nearest of 8 bits, one scale per output, or of 4 bits in groups of inputs.

    Args:
      weight: float, of any dtype.
      format: "int8" or "int4".
      quantize_activations: whether they are to take 8 bits too; in 4 bits always.
    """
    if format == "int4":
        return _to_int4(weight)
    return dataclasses.replace(_to_int8(weight), quantize_activations=quantize_activations)


def quantized_shape(weight: jax.ShapeDtypeStruct, format: str, quantize_activations: bool = True) -> Int8 | Int4:
    """What `quantize` gives, as shapes and dtypes only."""
    return jax.eval_shape(lambda weight: quantize(weight, format, quantize_activations), weight)


# What follows is compiled in parts: as one program, XLA on CPU computes the largest values again for every number.


def _to_int8(weight: jax.Array) -> Int8:
    scale = _scale(_largest(weight, weight.shape[1]), _MOST_8)
    return Int8(_rounded_8(weight, scale), scale, weight.dtype)


def _to_int4(weight: jax.Array) -> Int4:
    largest = _largest(weight, math.gcd(weight.shape[1] // 2, _GROUP))
    scale = _scale(largest, _MOST_4 * _MOST_GROUP_SCALE)
    group_scale = _group_scale(largest, scale)
    return Int4(_packed_4(_rounded_4(weight, scale, group_scale)), scale, group_scale, weight.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _largest(weight: jax.Array, group: int) -> jax.Array:
    """Largest size in each group of inputs: f32 [F, G]."""
    sizes = jnp.abs(weight.astype(jnp.float32))
    return jnp.max(sizes.reshape(weight.shape[0], -1, group), axis=2)


@functools.partial(jax.jit, static_argnums=1)
def _scale(largest: jax.Array, most: int) -> jax.Array:
    largest = jnp.max(largest, axis=1)
    return jnp.where(largest > 0, largest / most, 1.0)


@jax.jit
def _group_scale(largest: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.ceil(largest / (_MOST_4 * scale[:, None]) - 1e-3), 1, _MOST_GROUP_SCALE).astype(jnp.int8)


@jax.jit
def _rounded_8(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(weight.astype(jnp.float32) * (1 / scale)[:, None]).astype(jnp.int8)


@jax.jit
def _rounded_4(weight: jax.Array, scale: jax.Array, group_scale: jax.Array) -> jax.Array:
    """The 4-bit numbers plus 8: u8 [F, D]."""
    grouped = weight.astype(jnp.float32).reshape(*group_scale.shape, -1)
    numbers = jnp.round(grouped / (scale[:, None] * group_scale)[:, :, None])
    return (jnp.clip(numbers, -_MOST_4, _MOST_4) + 8).astype(jnp.uint8).reshape(weight.shape)


@jax.jit
def _packed_4(numbers: jax.Array) -> jax.Array:
    low, high = jnp.split(numbers, 2, axis=1)
    return low | high << 4
