"""Reductions that XLA spells badly."""

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.ops.weights import materialize


def argmax(x: jax.Array) -> jax.Array:
    """Index of the first largest value of each row [B, V]: i32 [B]; 0 where a row holds NaN.

    On CPU XLA's own takes pairs of value and index one by one, ten times as long as a maximum and a search for it.
    """
    x = materialize(x)  # computed twice, values might differ in their last bit
    largest = jnp.max(x, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    found = jnp.min(jnp.where(x == largest, index, x.shape[-1]), axis=-1)
    return jnp.where(found == x.shape[-1], 0, found)  # of NaN, nothing is the largest
