"""Beam search over the same state and steps as sampling; deterministic.

As in transformers: of the C best continuations of a row's K beams, those among the first K that end become finished
answers, scored by their mean log-probability per token (length penalty 1, <eos> counted); the best K that go on are the
next beams. A row is done when no beam's mean beats its worst finished answer and K are finished. What is still going on
at the length limit counts as finished there.

Axes: B rows, K beams, M tokens of an answer, V vocabulary, C candidates: K that go on, whatever ends.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax import ops
from paligemma_jax.config import PADDING_ID
from paligemma_jax.engine.sampling import RowOptions, StepConfig, TokenScores, advance, allow, is_eos, token_scores
from paligemma_jax.engine.state import DecodeState, fresh, take_rows, where_row
from paligemma_jax.engine.steps import Inputs, Params, first_logits, next_logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
    """K finished answers per row, best first; where there is none yet the mean is -inf.

    tokens: i32 [B, K, M].
    scores: [B, K, M], of the tokens.
    step: i32 [B, K], tokens of each.
    mean: f32 [B, K], mean log-probability per token.
    """

    tokens: jax.Array
    scores: TokenScores
    step: jax.Array
    mean: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """A beam search in progress.

    running: a state of B * K rows: the beams that go on, best first, those of a row one after the other. Its `done` is
      that of the row, and beams that end are finished instead.
    total: f32 [B, K], sum of the log-probabilities of each.
    """

    running: DecodeState
    total: jax.Array
    finished: Finished

    @property
    def best(self) -> tuple[jax.Array, TokenScores, jax.Array, jax.Array]:
        """Tokens [B, M], scores [B, M] and step [B] of the best finished answer of each row, and done [B]."""
        first = jax.tree.map(lambda x: x[:, 0], self.finished)
        return first.tokens, first.scores, first.step, self.running.done.reshape(self.total.shape)[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "num_slots", "num_beams"))
def prefill(
    params: Params,
    inputs: Inputs,
    options: RowOptions,
    *,
    config: StepConfig,
    num_tokens: int,
    num_slots: int,
    num_beams: int,
) -> BeamState:
    """Run the prompts once and choose the first token of each beam; arguments as for `steps.prefill`."""
    logits, cache = first_logits(params, config.model, inputs)
    num_rows = len(logits)
    copies = jnp.repeat(jnp.arange(num_rows), num_beams)
    logits, options, length = take_rows((logits, options, inputs.prefix_length), copies)
    running = fresh(take_rows(ops.pad_cache(cache, num_slots), copies), length, options, config, num_tokens)
    nothing = jnp.zeros((num_rows, num_beams, num_tokens), jnp.float32)
    finished = Finished(
        tokens=jnp.full(nothing.shape, PADDING_ID, jnp.int32),
        scores=TokenScores(nothing, nothing, nothing),
        step=jnp.zeros(nothing.shape[:2], jnp.int32),
        mean=jnp.full(nothing.shape[:2], -jnp.inf),
    )
    total = jnp.where(jnp.arange(num_beams)[None] == 0, 0.0, jnp.broadcast_to(-jnp.inf, nothing.shape[:2]))
    return _extend(BeamState(running, total, finished), logits, config)  # the beams are still one and the same


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames="state")
def decode(params: Params, state: BeamState, *, config: StepConfig, num_steps: int) -> BeamState:
    """Lengthen the beams by `num_steps` tokens; a row that is done stays as it is."""

    def step(state: BeamState, _: None) -> tuple[BeamState, None]:
        running = state.running
        logits, cache = next_logits(params, config.model, running.last, running.next_position, running)
        state = dataclasses.replace(state, running=dataclasses.replace(running, cache=cache))
        return _extend(state, logits[:, 0], config), None

    return lax.scan(step, state, None, length=num_steps)[0]


def _extend(state: BeamState, logits: jax.Array, config: StepConfig) -> BeamState:
    """Choose the next token of every beam from logits [B * K, V]."""
    running, (num_rows, num_beams) = state.running, state.total.shape
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprobs = allow(logprobs, running.step, running.options, running.position, config)

    # Of a beam as many as there are ids of <eos> may end. The best C of a row are among the best C of each beam.
    count = num_beams * (1 + len(config.model.eos_token_ids))
    num_candidates = min(count, logprobs.shape[-1])
    best, tokens = lax.top_k(logprobs, num_candidates)
    totals, order = lax.top_k((state.total.reshape(-1, 1) + best).reshape(num_rows, -1), count)
    parents = order // num_candidates  # [B, C]
    chosen = tokens, token_scores(logits, tokens, config.loc_start)
    tokens, scores = jax.tree.map(lambda x: jnp.take_along_axis(x.reshape(num_rows, -1), order, axis=1), chosen)

    first_row = num_beams * jnp.arange(num_rows)[:, None]
    step = running.step.reshape(num_rows, num_beams)[:, :1]  # [B, 1], of all beams of a row
    limit = running.options.limit.reshape(num_rows, num_beams)[:, :1]
    here = jnp.arange(running.tokens.shape[1])[None, None] == step[:, :, None]

    def lengthen(row: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(here, new[:, :, None], row[first_row + parents])  # [B, C, M]

    lengthened = jax.tree.map(lengthen, (running.tokens, running.scores), (tokens, scores))
    ends = is_eos(tokens, config.model)
    leading = jnp.arange(totals.shape[1])[None] < num_beams
    mean = jnp.where((ends | (step + 1 >= limit)) & leading, totals / (step + 1), -jnp.inf)
    candidates = Finished(*lengthened, jnp.broadcast_to(step + 1, mean.shape), mean)
    finished = _best(state.finished, candidates)

    total, survivors = lax.top_k(jnp.where(ends, -jnp.inf, totals), num_beams)
    parents = jnp.take_along_axis(parents, survivors, axis=1)
    rows = (first_row + parents).reshape(-1)
    tokens = jnp.take_along_axis(tokens, survivors, axis=1).reshape(-1)
    kept_tokens, kept_scores = _flat(_pick(lengthened, survivors))
    done = (step[:, 0] + 1 >= limit[:, 0]) | (total[:, 0] / (step[:, 0] + 1) <= finished.mean[:, -1])
    extended = dataclasses.replace(
        running,
        tokens=kept_tokens,
        scores=kept_scores,
        step=running.step + 1,
        done=running.done | jnp.repeat(done, num_beams),
        position=advance(running.options, take_rows(running.position, rows), tokens, config),
        cache=take_rows(running.cache, rows),
    )
    before = running.done.reshape(num_rows, num_beams)[:, 0]
    small = dataclasses.replace(running, cache=(), options=None), dataclasses.replace(extended, cache=(), options=None)
    kept = where_row(running.done, *small)  # the cache of a row that is done does not matter
    return BeamState(
        dataclasses.replace(kept, cache=extended.cache, options=running.options),
        where_row(before, state.total, total),
        where_row(before, state.finished, finished),
    )


def _pick(tree: Any, index: jax.Array) -> Any:
    """Entries `index` [B, C] of the second axis of arrays [B, K, ...]."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1), tree
    )


def _flat(tree: Any) -> Any:
    """Arrays [B, K, ...] as [B * K, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _best(first: Finished, second: Finished) -> Finished:
    """The best of both, as many as `first` has; of equals, those of `first`."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), first, second)
    _, order = lax.top_k(both.mean, first.mean.shape[1])
    return _pick(both, order)
