"""Words for what has none: those nearest to a soft token, and those that each layer would say at each position.

Both go through the vocabulary in parts, so that no array is [positions, V] for many positions or layers at once.

Axes: K vectors, D decoder width, V vocabulary, L layers, k words of a vector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.generation import engine
from paligemma_jax.models.quantized import Weight, rows_of
from paligemma_jax.pipeline import PaliGemma

_ROWS = 8192  # of the table that are compared at once
_LOGITS = 2**25  # numbers that the lens works out at once


def nearest(
    model: PaliGemma, vectors: jax.Array | np.ndarray, count: int, centred: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens whose embeddings point most as vectors [K, D] do: ids i32 [K, k] and cosines f32 [K, k], best first.

    With `centred` the mean directions of the table and of the vectors are taken off before: every embedding is near
    the one and every soft token of a picture near the other, so that plain cosines name the same few words everywhere.
    """
    table = model.params["language_model"]["embed_tokens"]["weight"]
    num_tokens = model.config.image_token_id  # what follows are no words
    size = min(_ROWS, num_tokens)
    # A part that would reach beyond the words starts earlier and skips what it repeats: one size, one program.
    parts = [(min(start, num_tokens - size), start) for start in range(0, num_tokens, size)]
    parts = [(begin, start - begin) for begin, start in parts]
    vectors, mean = _unit(jnp.asarray(vectors, jnp.float32)), jnp.zeros((1, vectors.shape[1]))
    if centred:
        mean = sum(_sum_of_directions(table, *part, size) for part in parts) / num_tokens
        vectors = _unit(vectors - vectors.mean(axis=0, keepdims=True))
    best = jnp.full((len(vectors), count), -jnp.inf), jnp.zeros((len(vectors), count), jnp.int32)
    for part in parts:
        best = _better(best, table, vectors, mean, *part, size)
    return np.asarray(best[1]), np.asarray(best[0])


def layers(model: PaliGemma, hidden: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What hidden states [L, K, D] of any layers would say: ids i32 [L, K, k] and probabilities f32, best first."""
    num_layers, num_vectors, width = hidden.shape
    size = min(1 << max(0, (_LOGITS // model.config.text.vocab_size).bit_length() - 1), num_layers * num_vectors)
    flat = hidden.reshape(-1, width)
    parts = []
    for start in range(0, len(flat), size):
        rows = jnp.minimum(jnp.arange(start, start + size), len(flat) - 1)  # the last part is filled up: one program
        parts.append(engine.likeliest(model.params, flat[rows], config=model.config, count=count))
    shape = (num_layers, num_vectors, count)
    ids, probabilities = (np.concatenate([np.asarray(x) for x in xs])[: len(flat)] for xs in zip(*parts, strict=True))
    return ids.reshape(shape), probabilities.reshape(shape)


@functools.partial(jax.jit, static_argnames="size")
def _sum_of_directions(table: Weight, begin: jax.Array, skipped: jax.Array, size: int) -> jax.Array:
    """Sum [1, D] of the directions of some rows, without the first `skipped`."""
    rows = _directions(table, begin, size)
    return jnp.sum(jnp.where(jnp.arange(size)[:, None] >= skipped, rows, 0.0), axis=0, keepdims=True)


@functools.partial(jax.jit, static_argnames="size")
def _better(
    best: tuple[jax.Array, jax.Array],
    table: Weight,
    vectors: jax.Array,
    mean: jax.Array,
    begin: jax.Array,
    skipped: jax.Array,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The best [K, k] cosines and ids of those known and of some more rows, without the first `skipped`."""
    cosines = jnp.matmul(vectors, _unit(_directions(table, begin, size) - mean).T, precision="highest")
    cosines = jnp.where(jnp.arange(size)[None] >= skipped, cosines, -jnp.inf)
    ids = jnp.broadcast_to(begin + jnp.arange(size, dtype=jnp.int32)[None], cosines.shape)
    cosines, ids = jnp.concatenate([best[0], cosines], axis=1), jnp.concatenate([best[1], ids], axis=1)
    top, places = jax.lax.top_k(cosines, best[0].shape[1])
    return top, jnp.take_along_axis(ids, places, axis=1)


def _directions(table: Weight, begin: jax.Array, size: int) -> jax.Array:
    """Rows `begin` ... `begin + size - 1` of the table, scaled to length one: f32 [size, D]."""
    return _unit(rows_of(table, begin + jnp.arange(size)).astype(jnp.float32))


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
