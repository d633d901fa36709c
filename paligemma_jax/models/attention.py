"""Attention: the one mask, rotary positions and the weighted sum.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dim, M = G T rows of a head.
"""

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.models import cpu
from paligemma_jax.models.layers import soft_cap

# Keys [B, K, S, H] and values [B, K, H, S] of one layer: the axis that is summed over is the last.
KeyValues = tuple[jax.Array, jax.Array]
Rotation = tuple[jax.Array, jax.Array]  # sines and cosines of the angles, each f32 [B, T, 1, H / 2]

_CACHED_SCORES = 1 << 22  # float32 scores that a cache of 16 MB holds
_FEWEST_QUERIES = 32  # that take a turn
_MASKED = -2.3819763e38  # finite, so that a row that sees nothing stays free of NaN


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
    """Sines and cosines that turn the halves of a head at positions [B, T] (arXiv 2104.09864)."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return lax.optimization_barrier((jnp.sin(angle), jnp.cos(angle)))  # or every layer would work them out again


def rope(x: jax.Array, sin_cos: Rotation) -> jax.Array:
    """Rotate the halves of each head [B, T, N, H] by its position, in float32."""
    sin, cos = sin_cos
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    mask: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped heads.

    q [B, T, N, H], k [B, K, S, H], v [B, K, H, S], mask [B, T, S] or None for all; `attention_weights` says how they
    are weighed. The result [B, T, N, H] has the dtype of v. On CPU many queries take turns, so that their scores stay
    in a cache.
    """
    count = _turns(q.shape, k.shape[2]) if jax.default_backend() == "cpu" else 1
    if count == 1:
        return _attend(q, k, v, scale, mask, softcap)

    def in_turns(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

    queries = (in_turns(q), None if mask is None else in_turns(mask))
    out = lax.map(lambda part: _attend(part[0], k, v, scale, part[1], softcap), queries)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _turns(shape: tuple[int, ...], num_keys: int) -> int:
    """In how many equal parts queries [B, T, N, H] had best take turns: the fewest whose scores are few enough."""
    batch, num_queries, num_heads, _ = shape
    counts = [n for n in range(1, max(1, num_queries // _FEWEST_QUERIES) + 1) if num_queries % n == 0]
    scores = batch * num_queries * num_heads * num_keys
    return next((n for n in counts if scores <= n * _CACHED_SCORES), counts[-1])


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: jax.Array | None, softcap: float | None
) -> jax.Array:
    weights = attention_weights(q, k, scale, mask, softcap).astype(v.dtype)
    out = cpu.product_per_head(weights.reshape(*k.shape[:2], -1, weights.shape[-1]), v)
    out = out.reshape(*weights.shape[:-1], -1).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attention_weights(
    q: jax.Array, k: jax.Array, scale: float, mask: jax.Array | None = None, softcap: float | None = None
) -> jax.Array:
    """How much each query makes of each key: float32 [B, K, G, T, S], which sums to one over S.

    Scores, which are multiplied by `scale` and then capped, and softmax are float32; see `attend` for the shapes.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    _, num_kv_heads, num_keys, _ = k.shape
    groups = num_heads // num_kv_heads
    grouped = q.reshape(batch, num_queries, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    scores = cpu.product_per_head(grouped.reshape(batch, num_kv_heads, -1, head_dim), k)
    scores = soft_cap(scores.reshape(batch, num_kv_heads, groups, num_queries, num_keys) * scale, softcap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    return cpu.softmax(scores)


def write_cache(cache: KeyValues, new: KeyValues, positions: jax.Array) -> KeyValues:
    """Put keys [B, K, T, H] and values [B, K, H, T] into a cache of S slots at each row's own positions [B, T].

    Positions beyond the cache are dropped.
    """
    k, v = cache
    new_k = jnp.swapaxes(new[0], 1, 2).astype(k.dtype)  # [B, T, K, H]
    new_v = jnp.moveaxis(new[1], 3, 1).astype(v.dtype)
    if positions.size == 1 and jax.default_backend() == "cpu":  # of a single place XLA would copy the whole cache
        positions = jnp.pad(positions, ((0, 0), (0, 1)), constant_values=k.shape[2])
        new_k, new_v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (new_k, new_v))
    rows = lax.broadcasted_iota(jnp.int32, positions.shape, 0)
    k = k.at[rows, :, positions].set(new_k, mode="drop", unique_indices=True)
    v = v.at[rows, :, :, positions].set(new_v, mode="drop", unique_indices=True)
    return k, v
