"""Speculation that is exact: the next tokens are guessed, and one pass of the network chooses at all their places.

A guess that equals what the network chooses there is right and saves a pass; the first wrong one is replaced, and what
follows it is thrown away. So the answers are those of plain decoding, drawn with the same keys, whatever is guessed.
A pass over a few tokens costs little more than over one where reading the weights takes the time.

What follows the end of a row's text is copied from an earlier place like it: in the answer, in the prompt, or in an
outline of the answer, which knows how boxes, masks and labels follow each other (arXiv 2304.04487). There any location
matches any other, and so do mask codes; their own values are guessed from what the network chose at their place in the
last pass, though behind a wrong guess (Jacobi decoding, arXiv 2305.10427).

Axes: B rows, P hint tokens, M answer slots, L = P + M, k guesses.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation import cache as kv_cache
from paligemma_jax.generation import engine
from paligemma_jax.generation.clock import Clock
from paligemma_jax.generation.grammar import Place
from paligemma_jax.generation.sampling import Odds, Rule, choose, move
from paligemma_jax.models import cpu, few_rows, quantized
from paligemma_jax.models.quantized import Quantized, Weight
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from paligemma_jax.tasks.classes import class_names
from paligemma_jax.tasks.detection import NUM_CODES

_NUM_GUESSES = 7  # k: a pass of eight tokens costs what one of four does on CPU (benchmarks/results/speculation.md)
_NUM_GUESSES_WHOLE = few_rows.MOST - 1  # in 8 bits: four rows cost little more than one, eight half as much again
_CONTEXT = 24  # tokens back that places are compared: a box, a mask and what stands before them
_HEAVY = 2**29  # weights of a decoder that a pass spends its time reading
_DEAREST = 1.3  # pass in products of plain steps: it has other costs too, and gains 1.6 tokens or more (the same table)
_DEAREST_WHOLE = 1.5  # in 8 bits: it gains 1.5 tokens or more; what it does besides products takes as long for one row
_BOX = "<loc0512>" * 4
_OBJECTS = {"detect": _BOX, "segment": _BOX + "<seg064>" * NUM_CODES}  # what stands before a label, by task

Kinds = tuple[tuple[int, int], ...]  # first id and end of each range of ids that match each other


@dataclasses.dataclass(frozen=True)
class Hints:
    """What guesses are copied from; it changes the speed only.

    text: i32 [B, P], an outline of each row's answer and its prompt, after -1.
    kinds: locations, and mask codes.
    outlined: a row has an outline.
    """

    text: np.ndarray
    kinds: Kinds
    outlined: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A generation in progress."""

    text: jax.Array  # i32 [B, L], hints, then the answer from column P on, then padding
    odds: Odds  # [B, M], of the answer
    place: Place | None  # [B], in the rule's grammar, after the last token
    leftover: jax.Array  # i32 [B, k], chosen in the last pass behind its wrong guess; -1 where nothing was
    cache: kv_cache.Cache
    prefix_length: jax.Array  # i32 [B]
    step: jax.Array  # i32 [B], tokens chosen so far; the last of them is not in the cache yet
    limit: jax.Array  # i32 [], most tokens of an answer
    done: jax.Array  # bool [B], the row has ended or reached the limit
    keys: jax.Array  # random key of each row [B]


def outline(prompt: str) -> str:
    """How the answer to a `detect` or `segment` prompt would be written; "" for other prompts."""
    if not (labels := class_names(prompt)):
        return ""
    # The last one twice: several things may have one label.
    return "\n" + " ; ".join(f"{_OBJECTS[prompt.split()[0]]} {label}" for label in [*labels, labels[-1]])


def hints(tokenizer: Tokenizer, prompts: Sequence[str]) -> Hints:
    """The hints that the prompts of a batch give; P is a power of two, so that few programs are compiled."""
    expected = [outline(prompt) for prompt in prompts]
    rows = [
        [*tokenizer.encode(text), *tokenizer.encode(prompt), tokenizer.newline_id]
        for text, prompt in zip(expected, prompts, strict=True)
    ]
    width = power_of_two(max(32, *map(len, rows)))
    text = np.array([[-1] * (width - len(row)) + row for row in rows], np.int32)
    ranges = (tokenizer.loc_start, len(LOC_TOKENS)), (tokenizer.seg_start, len(SEG_TOKENS))
    return Hints(text, tuple((start, start + count) for start, count in ranges), any(expected))


def choose_num_guesses(params: engine.Params, hints: Hints, speculate: bool | None) -> int:
    """How many tokens to guess at each pass if asked to speculate, or not: 0; None leaves it to what wins.

    That is for one answer with boxes of a large model in 16 bits or fewer, on a CPU with cheap passes. How cheap they
    are follows from what was measured of products with its weights.
    """
    if speculate is False:
        return 0
    on_cpu = jax.default_backend() == "cpu"
    weights = jax.tree.leaves(params["language_model"], is_leaf=lambda x: isinstance(x, Quantized))
    whole = on_cpu and any(isinstance(x, Quantized) and x.rounds for x in weights)
    count, dearest = (_NUM_GUESSES_WHOLE, _DEAREST_WHOLE) if whole else (_NUM_GUESSES, _DEAREST)
    if speculate or (on_cpu and len(hints.text) == 1 and hints.outlined and _is_cheap(weights, 1 + count, dearest)):
        return count
    return 0


def _is_cheap(weights: list[Weight], num_rows: int, dearest: float) -> bool:
    """Whether products are most of a pass, and those of so many rows take less than `dearest` times those of one."""
    weights = [x for x in weights if len(x.shape) == 2]
    if sum(x.size for x in weights) < _HEAVY:
        return False
    one = several = 0.0
    for weight in weights:
        if not (weight.rounds if isinstance(weight, Quantized) else weight.dtype.itemsize == 2):
            return False
        seconds = quantized.seconds if isinstance(weight, Quantized) else cpu.seconds
        one += seconds(weight, 1)
        several += seconds(weight, num_rows)
    return several < dearest * one


def guess(text: jax.Array, length: jax.Array, leftover: jax.Array, kinds: Kinds) -> jax.Array:
    """The k tokens that may follow the first `length` [B] of `text` [B, L]: i32 [B, k].

    They are copied from behind the place that is most like the end of the text: in most of its last values, then in
    most of their kinds, then the latest; a copy that reaches the end starts again. Where no value is the same, a
    `leftover` [B, k] of the copied kind is better.
    """
    last = length[:, None] - 1
    column = lax.broadcasted_iota(jnp.int32, text.shape, 1)
    values, of_a_kind = _count_alike(text, last), _count_alike(_kind(text, kinds), last)
    likeness = jnp.where(column < last, values * (_CONTEXT + 1) + of_a_kind, 0)
    place = text.shape[1] - 1 - jnp.argmax(likeness[:, ::-1], axis=1)[:, None]
    place = jnp.minimum(place, last - 1)  # when none is like it
    ahead = lax.broadcasted_iota(jnp.int32, leftover.shape, 1) % (last - place)
    copied = jnp.take_along_axis(text, place + 1 + ahead, axis=1)
    differs = jnp.take_along_axis(values, place, axis=1) == 0
    return jnp.where(differs & (_kind(leftover, kinds) == _kind(copied, kinds)), leftover, copied)


def _kind(tokens: jax.Array, kinds: Kinds) -> jax.Array:
    """Ids with the first of its range in place of each that is in one."""
    for start, end in kinds:
        tokens = jnp.where((tokens >= start) & (tokens < end), start, tokens)
    return tokens


def _count_alike(x: jax.Array, last: jax.Array) -> jax.Array:
    """How many values of x [B, L] up to each column are those up to column `last` [B, 1], of `_CONTEXT`: i32 [B, L]."""
    padded = jnp.pad(x, [(0, 0), (_CONTEXT, 0)], constant_values=-2)
    alike, count = jnp.ones(x.shape, bool), jnp.zeros(x.shape, jnp.int32)
    for start in range(_CONTEXT, 0, -1):
        alike &= padded[:, start : start + x.shape[1]] == jnp.take_along_axis(padded, last + start, axis=1)
        count += alike
    return count


@functools.partial(jax.jit, static_argnames=("config", "kinds", "num_passes"), donate_argnames="state")
def decode(
    params: engine.Params, state: State, rule: Rule, *, config: PaliGemmaConfig, kinds: Kinds, num_passes: int
) -> State:
    """Lengthen each answer by 1 .. k + 1 tokens, `num_passes` times; a row that is done stays as it is."""
    lengthen = functools.partial(_lengthen, params, rule=rule, config=config, kinds=kinds)
    return lax.scan(lambda state, _: (lengthen(state), None), state, None, length=num_passes)[0]


def _lengthen(params: engine.Params, state: State, rule: Rule, config: PaliGemmaConfig, kinds: Kinds) -> State:
    num_rows, num_guesses = state.leftover.shape
    num_slots = state.odds.logprobs.shape[1]
    begin = state.text.shape[1] - num_slots  # column of the answer
    length = begin + state.step
    guesses = guess(state.text, length, state.leftover, kinds)
    tokens = jnp.concatenate([jnp.take_along_axis(state.text, length[:, None] - 1, axis=1), guesses], axis=1)

    # A wrong guess leaves a wrong entry in the cache, at a position that queries cannot see until it is written anew.
    at = lax.broadcasted_iota(jnp.int32, tokens.shape, 1)  # [B, k + 1]
    steps = state.step[:, None] + at
    positions = state.prefix_length[:, None] + steps - 1
    logits, cache = engine.next_logits(params, config, tokens, positions, state.prefix_length, state.cache)
    keys = jnp.repeat(state.keys, num_guesses + 1)
    flat = logits.reshape(-1, logits.shape[-1])
    places = _places(state.place, guesses, rule)
    chosen = choose(flat, keys, steps.reshape(-1), rule, config.image_token_id, _flat(places))
    tokens, odds = jax.tree.map(lambda x: x.reshape(num_rows, -1), chosen)

    ends = tokens == config.eos_token_id
    right = jnp.cumprod(guesses == tokens[:, :-1], axis=1)
    ended = jnp.cumsum(ends[:, :-1], axis=1) > 0
    going_on = jnp.pad((right > 0) & ~ended, [(0, 0), (1, 0)], constant_values=True)
    kept = going_on & (steps < state.limit) & ~state.done[:, None]
    count = jnp.sum(kept, axis=1)
    behind = jnp.pad(tokens, [(0, 0), (0, num_guesses)], constant_values=-1)
    leftover = jnp.take_along_axis(behind, count[:, None] + at[:, :-1], axis=1)

    if rule.grammar is not None:  # after the last of the kept ones, which is no guess
        last = jnp.maximum(count, 1) - 1
        before = jax.tree.map(lambda x: x[jnp.arange(num_rows), last], places)
        moved = move(rule, before, jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0])
        place = jax.tree.map(functools.partial(engine.where_row, count > 0), moved, state.place)
    else:
        place = None

    rows = lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
    slots = jnp.where(kept, steps, num_slots)  # beyond the end: dropped
    step = state.step + count
    return dataclasses.replace(
        state,
        text=state.text.at[rows, begin + slots].set(tokens, mode="drop"),
        odds=jax.tree.map(lambda x, new: x.at[rows, slots].set(new, mode="drop"), state.odds, odds),
        place=place,
        leftover=leftover,
        cache=cache,
        step=step,
        done=state.done | jnp.any(kept & ends, axis=1) | (step >= state.limit),
    )


def _places(place: Place | None, guesses: jax.Array, rule: Rule) -> Place | None:
    """Where rows stand in the grammar before each guess [B, k] and behind the last: [B, k + 1]."""
    if place is None:
        return None
    places = [place]
    for i in range(guesses.shape[1]):
        places.append(move(rule, places[-1], guesses[:, i]))
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *places)


def _flat(places: Place | None) -> Place | None:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), places)


def generate(
    params: engine.Params,
    config: PaliGemmaConfig,
    inputs: engine.Inputs,
    keys: jax.Array,
    rule: Rule,
    max_new_tokens: int,
    chunk: int,
    clock: Clock,
    hints: Hints,
    num_guesses: int,
) -> Iterator[engine.Chunk]:
    """The answers of `engine.generate` as they come.

    First one step, then the steps that `chunk` passes have brought every row that goes on; n differs from chunk to
    chunk. Ends as `engine.generate` does.
    """
    num_slots = kv_cache.num_slots(inputs.tokens.shape[1], max_new_tokens)
    first = clock.call(engine.prefill, params, inputs, keys, rule, config=config, num_slots=num_slots)
    num_rows, begin = hints.text.shape
    shape = num_rows, num_slots - inputs.tokens.shape[1]
    text = np.concatenate([hints.text, np.full(shape, config.pad_token_id, np.int32)], axis=1)
    odds = Odds(*(np.zeros(shape, np.float32) for _ in range(3)))
    text[:, begin] = first.tokens
    for values, known in zip(jax.tree.leaves(odds), jax.tree.leaves(first.odds), strict=True):
        values[:, 0] = known
    state = State(
        text=text,
        odds=odds,
        place=first.place,
        leftover=np.full((num_rows, num_guesses), -1, np.int32),
        cache=first.cache,
        prefix_length=first.prefix_length,
        step=np.ones(num_rows, np.int32),
        limit=np.int32(max_new_tokens),
        done=np.asarray(first.done) | (max_new_tokens == 1),
        keys=first.keys,
    )
    yield text[None, :, begin], jax.tree.map(lambda x: x[None, :, 0], odds)
    given = furthest = 1
    done = state.done
    while not done.all():
        state = clock.call(decode, params, state, rule, config=config, kinds=hints.kinds, num_passes=chunk)
        step, done = np.asarray(state.step), np.asarray(state.done)
        clock.add_steps(int(step.max()) - furthest)
        furthest = int(step.max())
        common = furthest if done.all() else int(step[~done].min())
        if common > given:
            answer = np.asarray(state.text)[:, begin:], jax.tree.map(np.asarray, state.odds)
            yield jax.tree.map(lambda x: x[:, given:common].T, answer)  # noqa: B023
            given = common
