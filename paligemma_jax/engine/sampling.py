"""How the next token is chosen from logits: greedily, or at random from a filtered distribution, row by row.

Every row has its own settings, so greedy and sampled, constrained and free rows run in one batch, each with the tokens
of its answer alone.

Axes: B rows, M sequences (B n of them: n per row, one after the other), V vocabulary, C tokens of a sequence.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax import ops
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.processing.tokenizer import LOC_TOKENS

NEAR = 32  # locations to both sides that count as the same: 3% of an image's side


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a compiled step is specialised to: the geometry, and which options any of its rows uses.

    loc_start: id of the first location token; None where a vocabulary has none, whose scores are 0.
    samples: some row draws its tokens.
    filters: which of top_k, top_p and min_p some row uses.
    constrained: some row has a grammar.
    delayed: some row has a least number of tokens.
    """

    model: PaliGemmaConfig
    loc_start: int | None
    samples: bool = False
    filters: tuple[str, ...] = ()
    constrained: bool = False
    delayed: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOptions:
    """`GenerateOptions` of the rows of a state as arrays, one value per row [B].

    limit: i32, most tokens of an answer, <eos> included.
    least: i32, tokens before <eos> may be said.
    temperature, top_k, top_p, min_p: f32, those of `Sampling`.
    key: random key.
    grammar: i32 [B, S, F], the rows' tables (`constraints.grammar.tables`), or None.
    """

    limit: jax.Array
    least: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array
    grammar: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """What the model thinks of tokens [...], by its own distribution: over all of V, at temperature 1, unfiltered.

    logprobs: f32, log-probability of each.
    near: f32, probability of the locations at most `NEAR` away from one that is a location; else 0.
    expected: f32, mean location under the distribution over locations, in 0..1023.
    """

    logprobs: jax.Array
    near: jax.Array
    expected: jax.Array


def step_config(config: PaliGemmaConfig, loc_start: int, options: Sequence[GenerateOptions], constrained: bool):
    """The `StepConfig` of a step that answers with these options."""
    samplings = [o.sampling for o in options if o.sampling.temperature > 0]
    used = {
        "top_k": any(s.top_k > 0 for s in samplings),
        "top_p": any(s.top_p < 1 for s in samplings),
        "min_p": any(s.min_p > 0 for s in samplings),
    }
    filters = tuple(name for name, is_used in used.items() if is_used)
    delayed = any(o.min_new_tokens for o in options)
    return StepConfig(config, loc_start, bool(samplings), filters, constrained, delayed)


def row_options(options: Sequence[GenerateOptions], keys: jax.Array, tables: np.ndarray | None) -> RowOptions:
    """Options as arrays [B], with the rows' random keys [B] and grammar tables i32 [B, S, F]."""

    def array(name: str) -> np.ndarray:
        return np.array([getattr(o.sampling, name) for o in options], np.float32)

    limit, least = (np.array([getattr(o, f"{name}_new_tokens") for o in options], np.int32) for name in ("max", "min"))
    return RowOptions(limit, least, *map(array, ("temperature", "top_k", "top_p", "min_p")), keys, tables)


def row_keys(seeds: Sequence[int], requests: Sequence[Hashable]) -> jax.Array:
    """One random key per row [B], independent of the row's slot and neighbours.

    Equal requests in one batch get different keys: the n-th copy folds n into the key of its seed.
    """
    seen: Counter[Hashable] = Counter()
    copies = []
    for request in zip(seeds, requests, strict=True):
        copies.append(seen[request])
        seen[request] += 1
    return _fold_in_each(np.array(seeds, np.uint32), np.array(copies, np.uint32))


@jax.jit
def _fold_in_each(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)


def choose(
    logits: jax.Array,
    step: jax.Array,
    options: RowOptions,
    position: grammar.Position | None,
    config: StepConfig,
) -> tuple[jax.Array, TokenScores]:
    """The next token of each sequence, always an id that the model may say.

    Args:
      logits: f32 [M, V].
      step: i32 [M], how many tokens were chosen before; folded into the random keys.
      options: of the B rows, each of which has M / B sequences.
      position: of the sequences in their rows' grammars, if some row has one.

    Returns:
      Tokens i32 [M], and their scores [M].
    """
    allowed = allow(logits, step, options, position, config)
    tokens = ops.argmax(allowed)
    if config.samples:
        per_row = len(logits) // len(options.limit)
        temperature = jnp.repeat(options.temperature, per_row)
        keys = jax.vmap(jax.random.fold_in)(jnp.repeat(options.key, per_row), step)
        drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(allowed, options, config.filters))
        tokens = jnp.where(temperature > 0, drawn, tokens)
    tokens = tokens.astype(jnp.int32)
    scores = token_scores(logits, tokens[:, None], config.loc_start)
    return tokens, jax.tree.map(lambda x: x[:, 0], scores)


def allow(
    logits: jax.Array, step: jax.Array, options: RowOptions, position: grammar.Position | None, config: StepConfig
) -> jax.Array:
    """Logits or log-probabilities [M, V] with -inf for what may not be said next; arguments as for `choose`."""
    allowed = forbid(logits, config.model)
    per_row = len(logits) // len(options.limit)
    if config.delayed:
        ends = is_eos(lax.broadcasted_iota(jnp.int32, logits.shape, 1), config.model)
        too_early = step < jnp.repeat(options.least, per_row) - 1
        allowed = jnp.where(ends & too_early[:, None], -jnp.inf, allowed)
    if config.constrained:
        left = jnp.repeat(options.limit, per_row) - 1 - step
        allowed = grammar.allow(options.grammar, position, left, allowed)
    return allowed


def advance(
    options: RowOptions, position: grammar.Position | None, tokens: jax.Array, config: StepConfig
) -> grammar.Position | None:
    """Positions in the grammars after one more token each [M]; unchanged where no row has a grammar."""
    return grammar.advance(options.grammar, position, tokens) if config.constrained else position


def token_scores(logits: jax.Array, tokens: jax.Array, loc_start: int | None) -> TokenScores:
    """Scores [M, C] of tokens [M, C] under logits [M, V]."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = jnp.take_along_axis(logits, tokens, axis=-1) - total
    if loc_start is None:
        return TokenScores(logprobs, jnp.zeros_like(logprobs), jnp.zeros_like(logprobs))
    count = len(LOC_TOKENS)
    locations = lax.slice_in_dim(logits, loc_start, loc_start + count, axis=1)
    probabilities = jnp.exp(locations - total)
    location = jnp.arange(count)[None]
    expected = jnp.sum(jax.nn.softmax(locations, axis=1) * location, axis=1, keepdims=True)
    chosen = (tokens - loc_start)[:, :, None]
    near = jnp.sum(jnp.where(jnp.abs(location[:, None] - chosen) <= NEAR, probabilities[:, None], 0.0), axis=2)
    is_location = (tokens >= loc_start) & (tokens < loc_start + count)
    return TokenScores(logprobs, jnp.where(is_location, near, 0.0), jnp.broadcast_to(expected, logprobs.shape))


def forbid(logits: jax.Array, config: PaliGemmaConfig) -> jax.Array:
    """Logits [..., V] with those of the ids that no text has set to -inf."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    ranges = [(ids >= first) & (ids < end) if first else ids < end for first, end in config.text_ids]
    return jnp.where(functools.reduce(jnp.logical_or, ranges), logits, -jnp.inf)


def is_eos(tokens: jax.Array, config: PaliGemmaConfig) -> jax.Array:
    """Which tokens [...] end an answer."""
    return functools.reduce(jnp.logical_or, [tokens == id_ for id_ in config.eos_token_ids])


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of `tokens` [...] under `logits` [..., V]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def filter_logits(logits: jax.Array, options: RowOptions, filters: Sequence[str]) -> jax.Array:
    """Logits [M, V] of the distributions to draw from; -inf for what temperature, top-k, top-p and min-p leave out."""
    smallest = jnp.finfo(jnp.float32).tiny  # a temperature of 0 divides by it, and is not used

    def value(name: str) -> jax.Array:
        return jnp.repeat(getattr(options, name), len(logits) // len(options.limit))[:, None]

    logits = logits - jnp.max(logits, axis=-1, keepdims=True)  # at most 0: no overflow
    logits = logits / jnp.maximum(value("temperature"), smallest)
    if "top_k" in filters:
        top_k = value("top_k")
        logits = jnp.where(top_k > 0, _keep_largest(logits, jnp.ones_like, top_k), logits)
    if "top_p" in filters:
        top_p = jnp.maximum(value("top_p"), smallest)
        kept = _keep_largest(logits, lambda x: jax.nn.softmax(x, axis=-1), top_p)
        logits = jnp.where(top_p < 1, kept, logits)
    if "min_p" in filters:
        logits = jnp.where(logits >= jnp.log(value("min_p")), logits, -jnp.inf)
    return logits


def _keep_largest(logits: jax.Array, weigh: Callable[[jax.Array], jax.Array], target: jax.Array) -> jax.Array:
    """Keep the largest of each row [M, V], just as many as weigh `target` [M, 1] together.

    The threshold is built bit by bit in the order of floats: exact, and far cheaper than sorting a vocabulary.
    """
    weights = weigh(logits)
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # unsigned integers that sort as the floats do

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (sign >> i.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= higher, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= target, higher, threshold)

    threshold = lax.fori_loop(0, 32, set_bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))
    return jnp.where(order >= threshold, logits, -jnp.inf)
