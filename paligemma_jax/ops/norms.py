"""Normalisations over the last axis, in float32; the result has the dtype of its input.

Axes: D features.
"""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [..., D] over its root mean square, times `scale` [D] (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    # 1 / D and eps are inside the sum: of a single row XLA on GPU makes one kernel if nothing but unary operations lies
    # between a reduction and its broadcast, else two.
    mean = jnp.sum((jnp.square(y) + eps) * (1 / y.shape[-1]), axis=-1, keepdims=True)
    return (y * lax.rsqrt(mean) * along_last(scale, y)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """x [..., D] less its mean, over its standard deviation, times `scale` [D], plus `bias` [D] (arXiv 1607.06450)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * along_last(scale, y) + along_last(bias, y)).astype(x.dtype)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector [D] as float32 with the rank of x [..., D], so that every broadcast is written out."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)
