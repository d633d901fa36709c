"""Tokens nearest to a vector, and the logit lens: the tokens that hidden states of any layer predict.

The logit lens applies the final norm and the unembedding to hidden states between layers (nostalgebraist,
"interpreting GPT: the logit lens", 2020). Both functions work in chunks, so that no array is [positions, V] for many
positions or layers at once.

Axes: K vectors, D decoder width, V vocabulary, L layers, k tokens of each vector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax import ops
from paligemma_jax.api import PaliGemma
from paligemma_jax.engine import forward

_TABLE_ROWS = 8192  # of the embedding table in a chunk
_MAX_LOGITS = 2**25  # in a chunk


def nearest_tokens(
    model: PaliGemma, vectors: jax.Array | np.ndarray, count: int, centred: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens whose embeddings are nearest to vectors [K, D] by cosine similarity: ids i32 and cosines f32 [K, k].

    With `centred` the means of the unit embeddings and of the unit vectors are subtracted first: both sets are
    anisotropic, so that plain cosines rank the same few tokens first everywhere.
    """
    table = model.params["language_model"]["embed_tokens"]["weight"]
    ranges = model.config.text_ids  # spare rows have no text
    num_tokens = sum(end - first for first, end in ranges)
    size = min(_TABLE_ROWS, model.config.image_token_id)
    # A chunk that would reach beyond its range starts earlier and skips what it repeats: one size, one program.
    parts = [(min(start, end - size), start) for first, end in ranges for start in range(first, end, size)]
    parts = [(begin, start - begin) for begin, start in parts]
    vectors, mean = _unit(jnp.asarray(vectors, jnp.float32)), jnp.zeros((1, vectors.shape[1]))
    if centred:
        mean = sum(_sum_of_unit_rows(table, *part, size) for part in parts) / num_tokens
        vectors = _unit(vectors - vectors.mean(axis=0, keepdims=True))
    best = jnp.full((len(vectors), count), -jnp.inf), jnp.zeros((len(vectors), count), jnp.int32)
    for part in parts:
        best = _merge_top_k(best, table, vectors, mean, *part, size)
    return np.asarray(best[1]), np.asarray(best[0])


def top_tokens(model: PaliGemma, hidden: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The logit lens of hidden states [L, K, D] of any layers: ids i32 [L, K, k] and probabilities f32, best first."""
    num_layers, num_vectors, width = hidden.shape
    size = min(1 << max(0, (_MAX_LOGITS // model.config.text.vocab_size).bit_length() - 1), num_layers * num_vectors)
    flat = hidden.reshape(-1, width)
    parts = []
    for start in range(0, len(flat), size):
        rows = jnp.minimum(jnp.arange(start, start + size), len(flat) - 1)  # the last chunk is padded: one program
        parts.append(forward.top_tokens(model.params, flat[rows], config=model.config, count=count))
    shape = (num_layers, num_vectors, count)
    ids, probabilities = (np.concatenate([np.asarray(x) for x in xs])[: len(flat)] for xs in zip(*parts, strict=True))
    return ids.reshape(shape), probabilities.reshape(shape)


@functools.partial(jax.jit, static_argnames="size")
def _sum_of_unit_rows(table: ops.Weight, begin: jax.Array, skipped: jax.Array, size: int) -> jax.Array:
    """Sum [1, D] of some rows scaled to unit length, without the first `skipped`."""
    rows = _unit_rows(table, begin, size)
    return jnp.sum(jnp.where(jnp.arange(size)[:, None] >= skipped, rows, 0.0), axis=0, keepdims=True)


@functools.partial(jax.jit, static_argnames="size")
def _merge_top_k(
    best: tuple[jax.Array, jax.Array],
    table: ops.Weight,
    vectors: jax.Array,
    mean: jax.Array,
    begin: jax.Array,
    skipped: jax.Array,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """Top-k cosines and ids [K, k] over `best` and one more chunk of rows, without its first `skipped`."""
    cosines = jnp.matmul(vectors, _unit(_unit_rows(table, begin, size) - mean).T, precision="highest")
    cosines = jnp.where(jnp.arange(size)[None] >= skipped, cosines, -jnp.inf)
    ids = jnp.broadcast_to(begin + jnp.arange(size, dtype=jnp.int32)[None], cosines.shape)
    cosines, ids = jnp.concatenate([best[0], cosines], axis=1), jnp.concatenate([best[1], ids], axis=1)
    top, indices = jax.lax.top_k(cosines, best[0].shape[1])
    return top, jnp.take_along_axis(ids, indices, axis=1)


def _unit_rows(table: ops.Weight, begin: jax.Array, size: int) -> jax.Array:
    """Rows `begin` ... `begin + size - 1` of the table scaled to unit length: f32 [size, D]."""
    return _unit(ops.take_rows(table, begin + jnp.arange(size)).astype(jnp.float32))


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
