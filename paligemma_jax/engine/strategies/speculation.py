"""Speculation that is exact: draft tokens are proposed, and one pass of the network chooses at all their positions.

A draft token that equals what the network chooses there is accepted and saves a pass; the first wrong one is replaced,
and what follows it is thrown away. So the answers are those of plain decoding, drawn with the same keys, whatever is
proposed. A pass over a few tokens costs little more than over one where reading the weights takes the time.

Drafts are copied from an earlier column that is similar to the end of the row's text: in the answer, in the prompt, or
in an outline of the answer, which knows how boxes, masks and labels follow each other (arXiv 2304.04487). There any
location matches any other, and so do mask codes; their own values are proposed from what the network chose at their
position in the last pass, though behind a wrong draft (Jacobi decoding, arXiv 2305.10427).

Axes: B rows, P context tokens, M tokens of an answer, L = P + M, k draft tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax import ops
from paligemma_jax.buckets import power_of_two
from paligemma_jax.engine import steps
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.engine.sampling import RowOptions, StepConfig, advance, choose, is_eos
from paligemma_jax.engine.state import DecodeState, where_row
from paligemma_jax.engine.steps import Inputs, Params, next_logits
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from paligemma_jax.tasks.prompts import Prompt, plain

_NUM_DRAFTS = 7  # k: a pass of eight tokens costs what one of four does on CPU (benchmarks/results/speculation.md)
_NUM_DRAFTS_QUANTIZED = 3  # with activations in 8 bits: four rows cost little more than one, eight half as much again
_CONTEXT = 24  # tokens back that columns are compared: a box, a mask and what stands before them
_HEAVY = 2**29  # weights of a decoder that a pass spends its time reading
_MAX_COST = 1.3  # matmuls of a pass by those of a plain step: it has other costs too, and gains 1.6 tokens or more
_MAX_COST_QUANTIZED = 1.5  # it gains 1.5 tokens or more; what it does besides matmuls takes as long for one row
_BOX, _CODE = "<loc0512>" * 4, "<seg064>"

Kinds = tuple[tuple[int, int], ...]  # first id and end of each range of ids that match each other


@dataclasses.dataclass(frozen=True)
class Context:
    """What drafts are copied from; it changes the speed only.

    text: i32 [B, P], an outline of each row's answer and its prompt, after -1.
    kinds: locations, and mask codes.
    outlined: a row has an outline.
    """

    text: np.ndarray
    kinds: Kinds
    outlined: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculativeState:
    """Answers in progress, with what drafts come from.

    state: the rows.
    context: i32 [B, P].
    previous: i32 [B, k], chosen in the last pass behind its wrong draft; -1 where nothing was.
    """

    state: DecodeState
    context: jax.Array
    previous: jax.Array


def outline(prompt: Prompt) -> str:
    """How the answer to a `detect` or `segment` prompt would be written; "" for other prompts."""
    if not prompt.labels:
        return ""
    thing = _BOX + _CODE * prompt.task.num_codes
    # The last one twice: several objects may have one label.
    names = ["", ""] if prompt.is_bare else [f" {label}" for label in [*prompt.labels, prompt.labels[-1]]]
    return "\n" + " ; ".join(f"{thing}{name}" for name in names)


def context(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Context:
    """What the prompts of a batch give drafts to copy from; P is a power of two, so that few programs are compiled."""
    expected = [outline(prompt) for prompt in prompts]
    rows = [
        [*tokenizer.encode(text), *tokenizer.encode(plain(prompt.text).strip()), tokenizer.newline_id]
        for text, prompt in zip(expected, prompts, strict=True)
    ]
    width = power_of_two(max(32, *map(len, rows)))
    text = np.array([[-1] * (width - len(row)) + row for row in rows], np.int32)
    ranges = (tokenizer.loc_start, len(LOC_TOKENS)), (tokenizer.seg_start, len(SEG_TOKENS))
    return Context(text, tuple((start, start + count) for start, count in ranges), any(expected))


def choose_num_drafts(params: Params, context: Context, speculate: bool | None, table: ops.Table) -> int:
    """How many tokens to propose in each pass, 0 for plain decoding; None leaves it to what is known to be faster.

    That is for one answer with boxes of a large model in 16 bits or fewer, on a CPU where a pass of several tokens is
    cheap by the `table` of measured kernels.
    """
    if speculate is False:
        return 0
    decoder = params["language_model"]
    weights = jax.tree.leaves(decoder, is_leaf=ops.is_weight)
    quantized = any(getattr(weight, "quantize_activations", False) for weight in weights)
    count, limit = (_NUM_DRAFTS_QUANTIZED, _MAX_COST_QUANTIZED) if quantized else (_NUM_DRAFTS, _MAX_COST)
    if speculate:
        return count
    if len(context.text) > 1 or not context.outlined or sum(weight.size for weight in weights) < _HEAVY:
        return 0
    cost = ops.relative_cost(decoder, 1 + count, table)
    return count if cost is not None and cost < limit else 0


def propose(text: jax.Array, length: jax.Array, previous: jax.Array, kinds: Kinds) -> jax.Array:
    """The k draft tokens to follow the first `length` [B] of `text` [B, L]: i32 [B, k].

    They are copied from behind the column that is most similar to the end of the text: in most of its last values, then
    in most of their kinds, then the latest; a copy that reaches the end starts again. Where no value is the same, a
    previous proposal [B, k] of the copied kind is better.
    """
    last = length[:, None] - 1
    column = lax.broadcasted_iota(jnp.int32, text.shape, 1)
    values, of_a_kind = _count_equal(text, last), _count_equal(_kind(text, kinds), last)
    similarity = jnp.where(column < last, values * (_CONTEXT + 1) + of_a_kind, 0)
    match = text.shape[1] - 1 - jnp.argmax(similarity[:, ::-1], axis=1)[:, None]
    match = jnp.minimum(match, last - 1)  # when none is similar
    ahead = lax.broadcasted_iota(jnp.int32, previous.shape, 1) % (last - match)
    copied = jnp.take_along_axis(text, match + 1 + ahead, axis=1)
    differs = jnp.take_along_axis(values, match, axis=1) == 0
    return jnp.where(differs & (_kind(previous, kinds) == _kind(copied, kinds)), previous, copied)


def _kind(tokens: jax.Array, kinds: Kinds) -> jax.Array:
    """Ids with the first of its range in place of each that is in one."""
    for start, end in kinds:
        tokens = jnp.where((tokens >= start) & (tokens < end), start, tokens)
    return tokens


def _count_equal(x: jax.Array, last: jax.Array) -> jax.Array:
    """How many values of x [B, L] up to each column are those up to column `last` [B, 1], of `_CONTEXT`: i32 [B, L]."""
    padded = jnp.pad(x, [(0, 0), (_CONTEXT, 0)], constant_values=-2)
    equal, count = jnp.ones(x.shape, bool), jnp.zeros(x.shape, jnp.int32)
    for start in range(_CONTEXT, 0, -1):
        equal &= padded[:, start : start + x.shape[1]] == jnp.take_along_axis(padded, last + start, axis=1)
        count += equal
    return count


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "num_slots", "num_drafts"))
def prefill(
    params: Params,
    inputs: Inputs,
    options: RowOptions,
    context: jax.Array,
    *,
    config: StepConfig,
    num_tokens: int,
    num_slots: int,
    num_drafts: int,
) -> SpeculativeState:
    """Run prompts and choose the first token of each; arguments as for `steps.prefill`."""
    state = steps.prefill(params, inputs, options, config=config, num_tokens=num_tokens, num_slots=num_slots)
    return SpeculativeState(state, context, jnp.full((len(context), num_drafts), -1, jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "kinds", "num_steps"), donate_argnames="state")
def decode(
    params: Params, state: SpeculativeState, *, config: StepConfig, kinds: Kinds, num_steps: int
) -> SpeculativeState:
    """Lengthen each answer by 1 .. k + 1 tokens, `num_steps` times; a row that is done stays as it is."""
    lengthen = functools.partial(_lengthen, params, config=config, kinds=kinds)
    return lax.scan(lambda state, _: (lengthen(state), None), state, None, length=num_steps)[0]


def _lengthen(params: Params, speculative: SpeculativeState, config: StepConfig, kinds: Kinds) -> SpeculativeState:
    state, context = speculative.state, speculative.context
    num_rows, num_drafts = speculative.previous.shape
    num_tokens = state.tokens.shape[1]
    text = jnp.concatenate([context, state.tokens], axis=1)
    drafts = propose(text, context.shape[1] + state.step, speculative.previous, kinds)
    tokens = jnp.concatenate([state.last, drafts], axis=1)

    # A wrong draft leaves a wrong entry in the cache, at a position that queries cannot see until it is written anew.
    ahead = lax.broadcasted_iota(jnp.int32, tokens.shape, 1)  # [B, k + 1]
    step = state.step[:, None] + ahead
    logits, cache = next_logits(params, config.model, tokens, state.next_position + ahead, state)
    positions = _positions(state, drafts, config)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (logits, step, positions))
    chosen = choose(flat[0], flat[1], state.options, flat[2], config)
    tokens, scores = jax.tree.map(lambda x: x.reshape(num_rows, -1), chosen)

    ends = is_eos(tokens, config.model)
    accepted = jnp.cumprod(drafts == tokens[:, :-1], axis=1)
    ended = jnp.cumsum(ends[:, :-1], axis=1) > 0
    going_on = jnp.pad((accepted > 0) & ~ended, [(0, 0), (1, 0)], constant_values=True)
    kept = going_on & (step < state.options.limit[:, None]) & ~state.done[:, None]
    count = jnp.sum(kept, axis=1)
    behind = jnp.pad(tokens, [(0, 0), (0, num_drafts)], constant_values=-1)
    previous = jnp.take_along_axis(behind, count[:, None] + ahead[:, :-1], axis=1)

    position = state.position
    if config.constrained:  # after the last of the kept ones, which is no draft
        last = jnp.maximum(count, 1) - 1
        before = jax.tree.map(lambda x: x[jnp.arange(num_rows), last], positions)
        said = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
        position = where_row(count > 0, advance(state.options, before, said, config), state.position)

    rows = lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
    columns = jnp.where(kept, step, num_tokens)  # beyond the end: dropped

    def put(row: jax.Array, new: jax.Array) -> jax.Array:
        return row.at[rows, columns].set(new, mode="drop")

    state = dataclasses.replace(
        state,
        tokens=put(state.tokens, tokens),
        scores=jax.tree.map(put, state.scores, scores),
        step=state.step + count,
        done=state.done | jnp.any(kept & ends, axis=1) | (state.step + count >= state.options.limit),
        position=position,
        cache=cache,
    )
    return SpeculativeState(state, context, previous)


def _positions(state: DecodeState, drafts: jax.Array, config: StepConfig) -> grammar.Position | None:
    """Where rows stand in their grammars before each draft [B, k] and behind the last: [B, k + 1]."""
    if not config.constrained:
        return None
    positions = [state.position]
    for i in range(drafts.shape[1]):
        positions.append(advance(state.options, positions[-1], drafts[:, i], config))
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *positions)
