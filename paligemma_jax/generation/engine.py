"""Prefill and decode: compiled functions over one generation state, and the loop that drives them.

One picture, a ragged batch and a stream run the same programs. Shapes come in few sizes (`prepare`, `cache.num_slots`),
so a second prompt compiles nothing.

Axes: I pictures, N soft tokens of a picture, B rows, T prompt tokens, D decoder width, n steps of a chunk.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation import cache as kv_cache
from paligemma_jax.generation.clock import Clock
from paligemma_jax.generation.grammar import Place, start
from paligemma_jax.generation.sampling import Odds, Rule, choose, forbid, move, token_logprobs
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer

Params = dict[str, Any]
Chunk = tuple[np.ndarray, Odds]  # tokens i32 [n, B] and their odds, numpy arrays [n, B]

_MAX_PICTURES = 16  # pictures that the vision tower takes at once
_MAX_SCORES = 2**24  # attention scores of a head: a sequence with the 4096 tokens of a picture at 896 px runs alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A `Batch` whose pictures became soft tokens."""

    soft_tokens: jax.Array  # [I, N, D]
    tokens: jax.Array  # i32 [B, T]
    image_slots: jax.Array  # i32 [B, T]
    prefix_length: jax.Array  # i32 [B]
    length: jax.Array  # i32 [B]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A generation in progress."""

    tokens: jax.Array  # i32 [B], chosen last, not in the cache yet
    odds: Odds  # [B], of `tokens`
    place: Place | None  # [B], in the rule's grammar, after `tokens`
    cache: kv_cache.Cache
    prefix_length: jax.Array  # i32 [B]
    step: jax.Array  # i32 [], tokens chosen so far
    done: jax.Array  # bool [B], the row has ended
    keys: jax.Array  # random key of each row [B]


def apply(params: Params, config: PaliGemmaConfig, method: str, *args: Any) -> Any:
    """A method of the network; products of float32 weights are true float32 on every platform."""
    single = params["language_model"]["norm"]["weight"].dtype == jnp.float32
    with jax.default_matmul_precision("highest" if single else None):
        return PaliGemma(config).apply({"params": params}, *args, method=method)


@functools.partial(jax.jit, static_argnames="config")
def embed_image(params: Params, pixels: jax.Array, *, config: PaliGemmaConfig) -> jax.Array:
    """Pixels [I, S, S, 3] to soft tokens [I, N, D]."""
    return apply(params, config, "embed_image", pixels)


def first_logits(params: Params, config: PaliGemmaConfig, inputs: Inputs, num_slots: int):
    """Run whole prompts: logits [B, V] after each row's last token, and the filled cache."""
    arrays = (inputs.soft_tokens, inputs.tokens, inputs.image_slots, inputs.prefix_length, inputs.length)
    hidden, key_values = apply(params, config, "prefill", *arrays, (inputs.length - 1)[:, None])
    logits = lax.optimization_barrier(apply(params, config, "logits", hidden[:, 0]))  # as in `next_logits`
    return logits, kv_cache.from_prefill(key_values, num_slots)


def next_logits(
    params: Params, config: PaliGemmaConfig, tokens: jax.Array, positions: jax.Array, prefix_length: jax.Array, cache
):
    """Run n tokens [B, n] per row at their positions [B, n]: logits [B, n, V] after each, and the cache with them."""
    # Tied to the token, the table stays out of what XLA moves ahead of a loop: on CPU a whole copy of it in float32.
    decoder = params["language_model"]
    table, tokens = lax.optimization_barrier((decoder["embed_tokens"], tokens))
    params = params | {"language_model": decoder | {"embed_tokens": table}}
    logits, cache = apply(params, config, "decode", tokens, positions, prefix_length, cache)
    return lax.optimization_barrier(logits), cache  # or each that reads the logits works them out anew


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
def prefill(
    params: Params, inputs: Inputs, keys: jax.Array, rule: Rule, *, config: PaliGemmaConfig, num_slots: int
) -> State:
    """Run the prompts and choose the first token of each row."""
    logits, cache = first_logits(params, config, inputs, num_slots)
    step, place = jnp.int32(0), start(rule.grammar, len(logits))
    tokens, odds = choose(logits, keys, step, rule, config.image_token_id, place)
    place, done = move(rule, place, tokens), tokens == config.eos_token_id
    return State(tokens, odds, place, cache, inputs.prefix_length, step + 1, done, keys)


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames="state")
def decode(
    params: Params, state: State, rule: Rule, *, config: PaliGemmaConfig, num_steps: int
) -> tuple[State, tuple[jax.Array, Odds]]:
    """Choose n = `num_steps` more tokens: the new state, tokens i32 [n, B] and their odds [n, B].

    A row that has ended gives pad_token_id and 0.
    """

    def step(state: State, _: None) -> tuple[State, tuple[jax.Array, Odds]]:
        last, positions = state.tokens[:, None], (state.prefix_length + state.step - 1)[:, None]
        logits, cache = next_logits(params, config, last, positions, state.prefix_length, state.cache)
        chosen, odds = choose(logits[:, 0], state.keys, state.step, rule, config.image_token_id, state.place)
        tokens = jnp.where(state.done, config.pad_token_id, chosen)
        odds = jax.tree.map(lambda x: jnp.where(state.done, 0.0, x), odds)
        state = dataclasses.replace(
            state,
            tokens=tokens,
            odds=odds,
            place=move(rule, state.place, chosen),
            cache=cache,
            step=state.step + 1,
            done=state.done | (tokens == config.eos_token_id),
        )
        return state, (tokens, odds)

    return lax.scan(step, state, None, length=num_steps)


@functools.partial(jax.jit, static_argnames="config")
def encode_image(params: Params, pixels: jax.Array, *, config: PaliGemmaConfig) -> jax.Array:
    """Pixels [I, S, S, 3] to the image encoder's features [I, N, E], which the projector has not seen yet."""
    return apply(params, config, "encode_image", pixels)


@functools.partial(jax.jit, static_argnames="config")
def project(params: Params, features: jax.Array, *, config: PaliGemmaConfig) -> jax.Array:
    """Features [I, N, E] of the image encoder to soft tokens [I, N, D]."""
    return apply(params, config, "project", features)


@functools.partial(jax.jit, static_argnames=("config", "num_positions"))
def trace(
    params: Params, inputs: Inputs, *, config: PaliGemmaConfig, num_positions: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inside of a teacher-forced pass.

    Returns hidden states [L + 1, B, T, D], see `Gemma.trace`; the attention [L, B, heads, num_positions, T] of the
    positions that give the suffix tokens; and the log-probabilities of those tokens [B, num_positions].
    """
    arrays = (inputs.soft_tokens, inputs.tokens, inputs.image_slots, inputs.prefix_length, inputs.length)
    positions = _suffix_positions(inputs, num_positions)
    hidden, attention = apply(params, config, "trace", *arrays, positions - 1)
    logits = apply(params, config, "lens", jnp.take_along_axis(hidden[-1], (positions - 1)[:, :, None], axis=1))
    return hidden, attention, token_logprobs(logits, jnp.take_along_axis(inputs.tokens, positions, axis=1))


@functools.partial(jax.jit, static_argnames=("config", "count"))
def likeliest(params: Params, hidden: jax.Array, *, config: PaliGemmaConfig, count: int) -> tuple[jax.Array, jax.Array]:
    """The tokens that hidden states [M, D] of any layer would say: ids i32 [M, count] and probabilities, best first."""
    logits = forbid(apply(params, config, "lens", hidden), config.image_token_id)
    probabilities, tokens = lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return tokens, probabilities


@functools.partial(jax.jit, static_argnames=("config", "num_positions"))
def suffix_logits(params: Params, inputs: Inputs, *, config: PaliGemmaConfig, num_positions: int) -> jax.Array:
    """Teacher-forced logits [B, num_positions, V]: entry j is what the model expects as suffix token j."""
    arrays = (inputs.soft_tokens, inputs.tokens, inputs.image_slots, inputs.prefix_length, inputs.length)
    hidden, _ = apply(params, config, "prefill", *arrays, _suffix_positions(inputs, num_positions) - 1)
    return apply(params, config, "logits", hidden)


@functools.partial(jax.jit, static_argnames=("config", "num_positions"))
def suffix_logprobs(params: Params, inputs: Inputs, *, config: PaliGemmaConfig, num_positions: int) -> jax.Array:
    """Log-probability of each suffix token [B, num_positions]; entries beyond a row's own suffix mean nothing."""
    logits = suffix_logits(params, inputs, config=config, num_positions=num_positions)
    targets = jnp.take_along_axis(inputs.tokens, _suffix_positions(inputs, num_positions), axis=1)
    # A row with a short suffix runs into padding, whose id need not be below V.
    return token_logprobs(logits, jnp.minimum(targets, logits.shape[-1] - 1))


def _suffix_positions(inputs: Inputs, count: int) -> jax.Array:
    """Positions [B, count] of the first suffix tokens, kept inside the sequence."""
    positions = inputs.prefix_length[:, None] + jnp.arange(count)[None]
    return jnp.minimum(positions, inputs.tokens.shape[1] - 1)


def generate(
    params: Params,
    config: PaliGemmaConfig,
    inputs: Inputs,
    keys: jax.Array,
    rule: Rule,
    max_new_tokens: int,
    chunk: int,
    clock: Clock,
) -> Iterator[Chunk]:
    """What was chosen, as it comes: first one step, then `chunk` steps at a time.

    Ends with `max_new_tokens`, or within a chunk of the end of the last row; a row that ended before gives padding.
    """
    num_slots = kv_cache.num_slots(inputs.tokens.shape[1], max_new_tokens)
    state = clock.call(prefill, params, inputs, keys, rule, config=config, num_slots=num_slots)
    yield jax.tree.map(lambda x: np.asarray(x)[None], (state.tokens, state.odds))
    count = 1
    while count < max_new_tokens and not np.asarray(state.done).all():
        state, chosen = clock.call(decode, params, state, rule, config=config, num_steps=chunk)
        yield jax.tree.map(lambda x: np.asarray(x)[: max_new_tokens - count], chosen)  # noqa: B023
        count += chunk


def where_row(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows of x [B, ...] where the condition [B] holds, else of y."""
    return jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def most_at_once(num_tokens: int) -> int:
    """How many sequences of so many tokens may attend at once, so that their float32 scores fit in memory; 2**n."""
    return 1 << max(1, _MAX_SCORES // num_tokens**2).bit_length() - 1


def embed_pictures(
    params: Params, config: PaliGemmaConfig, pixels: np.ndarray, clock: Clock, projected: bool = True
) -> jax.Array:
    """Pixels [I, S, S, 3] to soft tokens [I, N, D], or to features [I, N, E], each picture once.

    The pictures are cut into powers of two: few programs, and none of them pads.
    """
    most = min(_MAX_PICTURES, most_at_once(config.vision.num_tokens))
    embed = embed_image if projected else encode_image
    pieces = []
    start = 0
    while start < len(pixels):
        size = min(most, 1 << (len(pixels) - start).bit_length() - 1)
        pieces.append(clock.call(embed, params, pixels[start : start + size], config=config))
        start += size
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def prepare(batch: Batch, soft_tokens: jax.Array, rows: range) -> Inputs:
    """Some rows of a batch and the soft tokens [I, N, D] of just the pictures they use.

    Rows and pictures are padded to a power of two with copies; results of rows beyond len(rows) are to be dropped.
    """
    num_tokens = soft_tokens.shape[1]
    index = np.asarray(rows)[_padded(len(rows))]
    slots = batch.image_slots[index]
    pictures = np.unique(slots[slots >= 0] // num_tokens)
    local = np.searchsorted(pictures, slots // num_tokens) * num_tokens + slots % num_tokens
    pictures = pictures[_padded(len(pictures))]
    if not np.array_equal(pictures, np.arange(len(soft_tokens))):
        soft_tokens = jnp.take(soft_tokens, pictures, axis=0)
    arrays = (batch.tokens[index], np.where(slots >= 0, local, -1), batch.prefix_length[index], batch.length[index])
    return Inputs(soft_tokens, *(np.asarray(x, np.int32) for x in arrays))


def prompts(tokenizer: Tokenizer, inputs: Inputs) -> list[str]:
    """The text of each row's prompt."""
    rows = zip(inputs.tokens, inputs.image_slots, inputs.prefix_length, strict=True)
    return [tokenizer.decode(ids[:length][slots[:length] < 0]).strip() for ids, slots, length in rows]


def _padded(count: int) -> np.ndarray:
    """0 .. count - 1, the last repeated up to a power of two."""
    return np.minimum(np.arange(power_of_two(count)), count - 1)
