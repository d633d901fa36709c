"""Beam search over the same prefill and decode as sampling; deterministic.

As in transformers: of the 2K best continuations of a row's K beams, those among the first K that end become finished
answers, scored by their mean log-probability per token (length penalty 1, <eos> counted); the best K that go on are the
next beams. A row is done when no beam's mean beats its worst finished answer and K are finished. What is still going on
at the length limit counts as finished there.

Axes: B rows, K beams, M answer slots, V vocabulary, C candidates (2K).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation import cache as kv_cache
from paligemma_jax.generation.clock import Clock
from paligemma_jax.generation.engine import Chunk, Inputs, Params, first_logits, next_logits, where_row
from paligemma_jax.generation.grammar import Place, allow, start
from paligemma_jax.generation.sampling import Odds, Rule, forbid, move, odds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """K partial or finished answers per row, best first; an empty place has score -inf."""

    tokens: jax.Array  # i32 [B, K, M]
    odds: Odds  # [B, K, M]
    scores: jax.Array  # f32 [B, K]: the sum of log-probabilities while going on, their mean when finished


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """A beam search in progress."""

    running: Beams
    finished: Beams
    place: Place | None  # [B * K], of the running beams in the rule's grammar
    cache: kv_cache.Cache  # B * K rows
    prefix_length: jax.Array  # i32 [B * K]
    step: jax.Array  # i32 [], tokens chosen so far
    limit: jax.Array  # i32 [], most tokens of an answer
    done: jax.Array  # bool [B]


@functools.partial(jax.jit, static_argnames=("config", "num_slots", "num_beams"))
def prefill(
    params: Params,
    inputs: Inputs,
    limit: jax.Array,
    rule: Rule,
    *,
    config: PaliGemmaConfig,
    num_slots: int,
    num_beams: int,
) -> BeamState:
    """Run the prompts once and choose the first token of each beam."""
    logits, cache = first_logits(params, config, inputs, num_slots)
    num_rows = logits.shape[0]
    shape = (num_rows, num_beams, num_slots - inputs.tokens.shape[1])
    empty = Beams(
        tokens=jnp.full(shape, config.pad_token_id, jnp.int32),
        odds=Odds(*(jnp.zeros(shape, jnp.float32) for _ in range(3))),
        scores=jnp.full(shape[:2], -jnp.inf, jnp.float32),
    )
    first = dataclasses.replace(empty, scores=empty.scores.at[:, 0].set(0.0))  # the beams are still one and the same
    copies = jnp.repeat(jnp.arange(num_rows), num_beams)
    place = jax.tree.map(lambda x: x[copies], start(rule.grammar, num_rows))
    state = BeamState(
        running=first,
        finished=empty,
        place=place,
        cache=kv_cache.take_rows(cache, copies),
        prefix_length=inputs.length[copies],
        step=jnp.int32(0),
        limit=limit,
        done=jnp.zeros(num_rows, bool),
    )
    return _advance(state, logits[copies], rule, config)


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames="state")
def decode(params: Params, state: BeamState, rule: Rule, *, config: PaliGemmaConfig, num_steps: int) -> BeamState:
    """Lengthen the beams by `num_steps` tokens; a row that is done stays as it is."""

    def step(state: BeamState, _: None) -> tuple[BeamState, None]:
        last = lax.dynamic_index_in_dim(state.running.tokens, state.step - 1, axis=2).reshape(-1, 1)
        positions = (state.prefix_length + state.step - 1)[:, None]
        logits, cache = next_logits(params, config, last, positions, state.prefix_length, state.cache)
        return _advance(dataclasses.replace(state, cache=cache), logits[:, 0], rule, config), None

    return lax.scan(step, state, None, length=num_steps)[0]


def _advance(state: BeamState, logits: jax.Array, rule: Rule, config: PaliGemmaConfig) -> BeamState:
    """Choose the next token of every beam from logits [B * K, V]."""
    running = state.running
    num_rows, num_beams, _ = running.tokens.shape
    logprobs = forbid(jax.nn.log_softmax(logits, axis=-1), config.image_token_id)
    if rule.grammar is not None:
        logprobs = allow(rule.grammar, state.place, state.step, logprobs)

    # The best 2K of a row are among the best 2K of each beam.
    num_candidates = min(2 * num_beams, logprobs.shape[-1])
    best, tokens = lax.top_k(logprobs, num_candidates)
    totals = (running.scores.reshape(-1, 1) + best).reshape(num_rows, -1)
    totals, order = lax.top_k(totals, 2 * num_beams)
    parents = order // num_candidates  # [B, C]
    chosen = tokens, odds(logits, tokens, rule.loc_start)
    chosen = jax.tree.map(lambda x: jnp.take_along_axis(x.reshape(num_rows, -1), order, axis=1), chosen)
    tokens = chosen[0]

    def lengthen(beams: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(_pick(beams, parents), new, state.step, axis=2)

    lengthened = jax.tree.map(lengthen, (running.tokens, running.odds), chosen)
    candidates = Beams(*lengthened, scores=totals)
    step = state.step + 1
    ends = tokens == config.eos_token_id
    leading = jnp.arange(totals.shape[1])[None] < num_beams
    mean = jnp.where((ends | (step >= state.limit)) & leading, totals / step, -jnp.inf)
    finished = _best(state.finished, dataclasses.replace(candidates, scores=mean))

    kept, survivors = lax.top_k(jnp.where(ends, -jnp.inf, totals), num_beams)
    going_on = dataclasses.replace(_pick_beams(candidates, survivors), scores=kept)
    parents = jnp.take_along_axis(parents, survivors, axis=1)
    cache_rows = (parents + num_beams * jnp.arange(num_rows)[:, None]).reshape(-1)

    place = jax.tree.map(lambda x: x[cache_rows], state.place)
    place = move(rule, place, jnp.take_along_axis(tokens, survivors, axis=1).reshape(-1))
    done = state.done | (step >= state.limit) | (kept[:, 0] / step <= finished.scores[:, -1])
    return dataclasses.replace(
        state,
        running=going_on,
        finished=jax.tree.map(functools.partial(where_row, state.done), state.finished, finished),
        place=place,
        cache=kv_cache.take_rows(state.cache, cache_rows),
        step=step,
        done=done,
    )


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Beams `index` [B, C] of x [B, K, M]: [B, C, M]."""
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


def _pick_beams(beams: Beams, index: jax.Array) -> Beams:
    """Beams `index` [B, C], with their scores."""
    picked = jax.tree.map(lambda x: _pick(x, index), (beams.tokens, beams.odds))
    return Beams(*picked, jnp.take_along_axis(beams.scores, index, axis=1))


def _best(first: Beams, second: Beams) -> Beams:
    """The best of both, as many as `first` has; of equals, those of `first`."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), first, second)
    _, order = lax.top_k(both.scores, first.scores.shape[1])
    return _pick_beams(both, order)


def search(
    params: Params,
    config: PaliGemmaConfig,
    inputs: Inputs,
    num_beams: int,
    rule: Rule,
    max_new_tokens: int,
    chunk: int,
    clock: Clock,
) -> Chunk:
    """The best answer of each row, n = `max_new_tokens`.

    Of the rule only what it notes and allows is used. What follows an answer's <eos> is padding, with odds of 0.
    """
    num_slots = kv_cache.num_slots(inputs.tokens.shape[1], max_new_tokens)
    static = {"config": config, "num_slots": num_slots, "num_beams": num_beams}
    state = clock.call(prefill, params, inputs, np.int32(max_new_tokens), rule, **static)
    while not np.asarray(state.done).all():
        state = clock.call(decode, params, state, rule, config=config, num_steps=chunk)
    best = state.finished
    return jax.tree.map(lambda x: np.asarray(x)[:, 0, :max_new_tokens].T, (best.tokens, best.odds))
