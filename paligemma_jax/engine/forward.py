"""Teacher-forced passes: what the model makes of answers that are given.

Axes: B rows, T tokens, L layers, D decoder width, V vocabulary, M hidden states.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine.sampling import forbid, token_logprobs
from paligemma_jax.engine.steps import Inputs, Params, apply


@dataclasses.dataclass(frozen=True)
class Trace:
    """Hidden states and attention of one prompt with its answer.

    Axes: T positions, L layers, I images, N patches, D decoder width.

    tokens: i32 [T], images, prompt, answer and <eos>.
    patches: i32 [T], which of the I * N patches stands at a position, -1 for text.
    prefix_length: how many positions come before the answer.
    soft_tokens: [I, N, D].
    hidden: [L + 1, T, D], what enters each layer, and what leaves the last one, before the final norm.
    attention: f32 [L, heads, n, T], attention probabilities of the position that gives answer token i.
    logprobs: f32 [n], of the answer's tokens.
    """

    tokens: np.ndarray
    patches: np.ndarray
    prefix_length: int
    soft_tokens: jax.Array
    hidden: jax.Array
    attention: np.ndarray
    logprobs: np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "num_positions"))
def suffix_logits(params: Params, inputs: Inputs, *, config: PaliGemmaConfig, num_positions: int) -> jax.Array:
    """Logits f32 [B, num_positions, V]: entry j is what the model expects as suffix token j."""
    hidden, _ = apply(params, config, "prefill", *inputs.arrays, _suffix_positions(inputs, num_positions) - 1)
    return apply(params, config, "logits", hidden)


@functools.partial(jax.jit, static_argnames=("config", "num_positions"))
def suffix_logprobs(params: Params, inputs: Inputs, *, config: PaliGemmaConfig, num_positions: int) -> jax.Array:
    """Log-probability of each suffix token [B, num_positions]; entries beyond a row's own suffix mean nothing."""
    logits = suffix_logits(params, inputs, config=config, num_positions=num_positions)
    targets = jnp.take_along_axis(inputs.tokens, _suffix_positions(inputs, num_positions), axis=1)
    return token_logprobs(logits, targets)


@functools.partial(jax.jit, static_argnames=("config", "num_positions"))
def trace(
    params: Params, inputs: Inputs, *, config: PaliGemmaConfig, num_positions: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states and attention probabilities of a pass.

    Returns hidden states [L + 1, B, T, D], see `Gemma.trace`; the attention [L, B, heads, num_positions, T] of the
    positions that give the suffix tokens; and the log-probabilities of those tokens [B, num_positions].
    """
    positions = _suffix_positions(inputs, num_positions)
    hidden, attention = apply(params, config, "trace", *inputs.arrays, positions - 1)
    logits = apply(params, config, "lens", jnp.take_along_axis(hidden[-1], (positions - 1)[:, :, None], axis=1))
    return hidden, attention, token_logprobs(logits, jnp.take_along_axis(inputs.tokens, positions, axis=1))


@functools.partial(jax.jit, static_argnames=("config", "count"))
def top_tokens(
    params: Params, hidden: jax.Array, *, config: PaliGemmaConfig, count: int
) -> tuple[jax.Array, jax.Array]:
    """Logit lens: the likeliest tokens after hidden states [M, D] of any layer.

    Returns ids i32 [M, count] and their probabilities, best first.
    """
    logits = forbid(apply(params, config, "lens", hidden), config)
    probabilities, tokens = lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return tokens, probabilities


def _suffix_positions(inputs: Inputs, count: int) -> jax.Array:
    """Positions [B, count] of the first suffix tokens, kept inside the sequence."""
    positions = inputs.prefix_length[:, None] + jnp.arange(count)[None]
    return jnp.minimum(positions, inputs.tokens.shape[1] - 1)
