"""The one attention mask, and rotary positions.

Axes: B batch, T queries, S keys, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax import ops

Rotation = tuple[jax.Array, jax.Array]  # sines and cosines of the angles, each f32 [B, T, 1, H / 2]


def prefix_lm_mask(
    positions: jax.Array, num_keys: int, prefix_length: jax.Array, length: jax.Array, window: int | None = None
) -> jax.Array:
    """Which keys each query may see: bool [B, T, S].

    `positions` [B, T] are those of the queries, key s has position s; `prefix_length` and `length` [B] count the valid
    tokens of a row. The prefix (image and prompt) sees itself in both directions, the suffix sees what came before,
    padding is seen by nobody. With a prefix of 3, 5 valid tokens and one of padding:

        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 1 1 1 0   <- padding, its output is never used

    A `window` lets suffix queries look back over that many keys, themselves included; the prefix is never windowed
    (as transformers does; big_vision has no window at all).
    """
    query = positions[:, :, None]
    key = jnp.arange(num_keys)[None, None, :]
    prefix = prefix_length[:, None, None]
    suffix_sees = key <= query
    if window is not None:
        suffix_sees &= key > query - window
    sees = jnp.where(query < prefix, key < prefix, suffix_sees)
    return sees & (key < length[:, None, None])


def rotation(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Sines and cosines of the angles that rotate the halves of a head at positions [B, T] (arXiv 2104.09864)."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return ops.materialize((jnp.sin(angle), jnp.cos(angle)))  # once for all layers


def rope(x: jax.Array, sin_cos: Rotation) -> jax.Array:
    """Rotate the halves of each head [B, T, N, H] by its position, in float32.

    (first, second) becomes (first cos - second sin, second cos + first sin): a sum of two products of the whole head,
    the second with its halves exchanged, which XLA takes as one loop where it would copy parts that are concatenated.
    """
    sin, cos = (part[..., None, :] for part in sin_cos)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    signs = jnp.array([-1.0, 1.0])[:, None].reshape((1,) * (halves.ndim - 2) + (2, 1))
    rotated = halves * cos + lax.rev(halves, (halves.ndim - 2,)) * (sin * signs)
    return rotated.reshape(x.shape).astype(x.dtype)
