"""The key-value cache: a fixed number of slots per row, a slot's index is its token's position.

Axes: B rows, T prompt tokens, S slots, K key-value heads, H head dim.
"""

import jax
import jax.numpy as jnp

from paligemma_jax.buckets import power_of_two
from paligemma_jax.models.attention import KeyValues

Cache = tuple[KeyValues, ...]  # one pair per layer


def from_prefill(key_values: Cache, num_slots: int) -> Cache:
    """Keys [B, K, T, H] and values [B, K, H, T] of whole prompts, padded to S = `num_slots`.

    Slots from a row's own length on hold padding; the mask hides them until a new token takes their place.
    """
    none, more = (0, 0), (0, num_slots - key_values[0][0].shape[2])
    return tuple(
        (jnp.pad(keys, (none, none, more, none)), jnp.pad(values, (none, none, none, more)))
        for keys, values in key_values
    )


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row i is row `rows[i]` of this one; `rows` may repeat and drop some."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), cache)


def num_slots(prompt_tokens: int, max_new_tokens: int) -> int:
    """Slots for padded prompts and the answer, whose share is a power of two so that few programs are compiled."""
    return prompt_tokens + max(32, power_of_two(max_new_tokens))
