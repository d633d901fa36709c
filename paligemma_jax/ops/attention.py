"""Attention with grouped heads, and the key-value cache: a fixed number of slots per row.

A slot's index is its token's position. Which way is taken depends on the platform that a program is lowered for, not on
the one it is traced on.

Axes: B batch, T queries, S keys or slots, N query heads, K key-value heads, G = N / K, H head dim, M = G T rows of a
head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from paligemma_jax.ops.cpu import gemv, matmul

# Keys [B, K, S, H] and values [B, K, H, S] of one layer: the axis that is summed over is the last.
KeyValues = tuple[Array, Array]
Cache = tuple[KeyValues, ...]  # one pair per layer

_CACHED_SCORES = 1 << 22  # float32 scores that a processor's cache of 16 MB holds
_FEWEST_QUERIES = 32  # that take a turn
_LARGE_HEADS = 2**16  # numbers in keys or values from which on the GEMV kernel is worth starting
_MASKED = -2.3819763e38  # finite, so that a row that sees nothing stays free of NaN

_Matmul = Callable[[Array, Array], Array]
_Mask, _Cap = Array | None, float | None


def attend(q: Array, k: Array, v: Array, scale: float, mask: _Mask = None, softcap: _Cap = None) -> Array:
    """Softmax attention with grouped heads.

    q [B, T, N, H], k [B, K, S, H], v [B, K, H, S], mask [B, T, S] or None for all. Scores are multiplied by `scale`,
    then capped; they and their softmax are float32. The result [B, T, N, H] has the dtype of v.
    """
    options = {"scale": scale, "softcap": softcap}
    default = _attend_by_library if softcap is None else functools.partial(_attend, dot=_dot)
    return lax.platform_dependent(
        q, k, v, mask, cpu=functools.partial(_attend_on_cpu, **options), default=functools.partial(default, **options)
    )


def attention_probabilities(q: Array, k: Array, scale: float, mask: _Mask = None, softcap: _Cap = None) -> Array:
    """What `attend` weighs values by: float32 [B, N, T, S], which sums to one over S."""
    found = _probabilities(q, k, mask, scale, softcap, _dot)
    return found.reshape(q.shape[0], q.shape[2], *found.shape[3:])


def write_cache(cache: KeyValues, new: KeyValues, positions: Array) -> KeyValues:
    """Put keys [B, K, T, H] and values [B, K, H, T] into a layer's cache of S slots at each row's positions [B, T].

    Positions beyond the cache are dropped.
    """
    if positions.size > 1:
        return _scatter(cache, new, positions)
    return lax.platform_dependent(cache, new, positions, tpu=_scatter, default=_scatter_one)


def pad_cache(key_values: Cache, num_slots: int) -> Cache:
    """Keys [B, K, T, H] and values [B, K, H, T] of whole prompts, padded to S = `num_slots`.

    Slots from a row's own length on hold padding; the mask hides them until a new token takes their place.
    """
    none, more = (0, 0), (0, num_slots - key_values[0][0].shape[2])
    return tuple((jnp.pad(k, (none, none, more, none)), jnp.pad(v, (none, none, none, more))) for k, v in key_values)


def num_cache_slots(cache: Cache) -> int:
    """S."""
    return cache[0][0].shape[2]


def _attend_by_library(q: Array, k: Array, v: Array, mask: _Mask, scale: float, softcap: None) -> Array:
    mask = None if mask is None else mask[:, None]
    k, v = jnp.swapaxes(k, 1, 2).astype(q.dtype), jnp.moveaxis(v, 3, 1)
    return jax.nn.dot_product_attention(q, k, v.astype(q.dtype), mask=mask, scale=scale).astype(v.dtype)


def _attend_on_cpu(q: Array, k: Array, v: Array, mask: _Mask, scale: float, softcap: _Cap) -> Array:
    """Many queries take turns, so that their scores stay in a cache."""
    run = functools.partial(_attend, scale=scale, softcap=softcap, dot=_dot_on_cpu)
    count = _turns(q.shape, k.shape[2])
    if count == 1:
        return run(q, k, v, mask)

    def in_turns(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

    queries = (in_turns(q), None if mask is None else in_turns(mask))
    out = lax.map(lambda part: run(part[0], k, v, part[1]), queries)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _turns(shape: tuple[int, ...], num_keys: int) -> int:
    """In how many equal parts queries [B, T, N, H] had best take turns: the fewest whose scores are few enough."""
    batch, num_queries, num_heads, _ = shape
    counts = [n for n in range(1, max(1, num_queries // _FEWEST_QUERIES) + 1) if num_queries % n == 0]
    scores = batch * num_queries * num_heads * num_keys
    return next((n for n in counts if scores <= n * _CACHED_SCORES), counts[-1])


def _attend(q: Array, k: Array, v: Array, mask: _Mask, scale: float, softcap: _Cap, dot: _Matmul) -> Array:
    weights = _probabilities(q, k, mask, scale, softcap, dot).astype(v.dtype)
    out = dot(weights.reshape(*k.shape[:2], -1, weights.shape[-1]), v)
    out = out.reshape(*weights.shape[:-1], -1).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _probabilities(q: Array, k: Array, mask: _Mask, scale: float, softcap: _Cap, dot: _Matmul) -> Array:
    """float32 [B, K, G, T, S]."""
    batch, num_queries, num_heads, head_dim = q.shape
    _, num_kv_heads, num_keys, _ = k.shape
    groups = num_heads // num_kv_heads
    grouped = q.reshape(batch, num_queries, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    scores = dot(grouped.reshape(batch, num_kv_heads, -1, head_dim), k)
    scores = soft_cap(scores.reshape(batch, num_kv_heads, groups, num_queries, num_keys) * scale, softcap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    return jax.nn.softmax(scores, axis=-1)


def soft_cap(x: Array, cap: float | None) -> Array:
    """Squash to (-cap, cap) by tanh; the identity without a cap (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _dot(x: Array, y: Array) -> Array:
    """Rows [B, K, M, D] times keys or values y [B, K, F, D] of the same head, summed in float32: [B, K, M, F]."""
    return lax.dot_general(x, y, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _dot_on_cpu(x: Array, y: Array) -> Array:
    """The same by a GEMV kernel where rows are few: XLA lays y out anew for its own, which takes longer."""
    if _uses_gemv(x, y):
        return _gemv(x, y)
    return _dot(matmul.pad_rows(x), y)[:, :, : x.shape[2]]


def _uses_gemv(x: Array, y: Array) -> bool:
    return 1 < x.shape[2] <= gemv.MOST_ROWS and y.size >= _LARGE_HEADS and y.dtype.itemsize == 2


@jax.custom_vjp
def _gemv(x: Array, y: Array) -> Array:
    return gemv.per_head_matmul(x, y)


_gemv.defvjp(lambda x, y: (_gemv(x, y), (x, y)), lambda saved, dz: jax.vjp(_dot, *saved)[1](dz))


def _scatter(cache: KeyValues, new: KeyValues, positions: Array) -> KeyValues:
    k, v = cache
    new_k = jnp.swapaxes(new[0], 1, 2).astype(k.dtype)  # [B, T, K, H]
    new_v = jnp.moveaxis(new[1], 3, 1).astype(v.dtype)
    if more := positions.shape[1] - new_k.shape[1]:
        new_k, new_v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (new_k, new_v))
    rows = lax.broadcasted_iota(jnp.int32, positions.shape, 0)
    k = k.at[rows, :, positions].set(new_k, mode="drop", unique_indices=True)
    v = v.at[rows, :, :, positions].set(new_v, mode="drop", unique_indices=True)
    return k, v


def _scatter_one(cache: KeyValues, new: KeyValues, positions: Array) -> KeyValues:
    """One position and one that is dropped: of a single one XLA on CPU copies the whole cache at each step (jax 0.10 to
    0.12), and on GPU starts two kernels where a scatter is one. Delete when `test_a_step_copies_no_cache` passes
    without."""
    return _scatter(cache, new, jnp.pad(positions, ((0, 0), (0, 1)), constant_values=cache[0].shape[2]))
