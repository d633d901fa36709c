"""The one state of a generation: what each row has said, what it was asked for, and its key-value cache.

Plain and streamed answers, beams, speculation and a server's slots all keep their rows in it. Every field is per row:
rows of different requests share a state, and a row that ends leaves its slot to the next one.

Axes: B rows, M tokens of an answer at most, T prompt tokens, S cache slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import PADDING_ID
from paligemma_jax.engine.constraints import grammar
from paligemma_jax.engine.sampling import RowOptions, StepConfig, TokenScores, advance, choose, is_eos
from paligemma_jax.ops import Cache, pad_cache

_MIN_ANSWER = 32  # tokens that every state has room for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Answers in progress. One whose cache holds nothing but the prompts is a prefix, to be inserted into another.

    tokens: i32 [B, M], the answers so far, then padding; the last token of each is not in the cache yet.
    scores: [B, M], of the tokens, 0 behind them.
    step: i32 [B], how many tokens the row has said.
    prefix_length: i32 [B], tokens of its prompt, those of images included.
    done: bool [B], the row has ended or reached its limit, or is empty.
    options: [B], what was asked for.
    position: [B], in the rows' grammars, None where no row can have one.
    cache: keys and values of each layer, whose slot s holds the token at position s.
    """

    tokens: jax.Array
    scores: TokenScores
    step: jax.Array
    prefix_length: jax.Array
    done: jax.Array
    options: RowOptions
    position: grammar.Position | None
    cache: Cache

    @property
    def last(self) -> jax.Array:
        """The token of each row that was chosen last: i32 [B, 1]."""
        return jnp.take_along_axis(self.tokens, jnp.maximum(self.step - 1, 0)[:, None], axis=1)

    @property
    def next_position(self) -> jax.Array:
        """The position of that token: i32 [B, 1]."""
        return jnp.maximum(self.prefix_length + self.step - 1, 0)[:, None]


def answer_size(max_new_tokens: int) -> int:
    """M for answers of so many tokens, one of few sizes so that few programs are compiled."""
    return max(_MIN_ANSWER, power_of_two(max_new_tokens))


def fresh(
    cache: Cache, prefix_length: jax.Array, options: RowOptions, config: StepConfig, num_tokens: int
) -> DecodeState:
    """A state whose rows have said nothing yet; M = `num_tokens`."""
    count = len(prefix_length)
    nothing = jnp.zeros((count, num_tokens), jnp.float32)
    return DecodeState(
        tokens=jnp.full((count, num_tokens), PADDING_ID, jnp.int32),
        scores=TokenScores(nothing, nothing, nothing),
        step=jnp.zeros(count, jnp.int32),
        prefix_length=prefix_length,
        done=jnp.zeros(count, bool),
        options=options,
        position=None if options.grammar is None else grammar.start(options.grammar),
        cache=cache,
    )


def say(state: DecodeState, logits: jax.Array, config: StepConfig) -> DecodeState:
    """Choose one more token of each row from logits [B, V]; rows that are done stay as they are."""
    tokens, scores = choose(logits, state.step, state.options, state.position, config)
    return append(state, tokens, scores, config)


def append(state: DecodeState, tokens: jax.Array, scores: TokenScores, config: StepConfig) -> DecodeState:
    """Add a token [B] with its scores to each row that is not done."""
    column = lax.broadcasted_iota(jnp.int32, state.tokens.shape, 1)
    here = (column == state.step[:, None]) & ~state.done[:, None]

    def put(row: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(here, new[:, None], row)

    step = state.step + ~state.done
    ended = is_eos(tokens, config.model) | (step >= state.options.limit)
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, tokens),
        scores=jax.tree.map(put, state.scores, scores),
        step=step,
        done=state.done | ended,
        position=advance(state.options, state.position, tokens, config),
    )


def take_rows(tree: Any, rows: jax.Array) -> Any:
    """A tree of arrays [B, ...] whose row i is row `rows[i]` of this one; `rows` may repeat and drop some."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)


def where_row(condition: jax.Array, x: Any, y: Any) -> Any:
    """Trees of arrays [B, ...]: rows of x where the condition [B] holds, else of y."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), x, y)


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, slots: jax.Array, prefix: DecodeState) -> DecodeState:
    """Put the rows of a prefix into slots i32 [b] of a state, whatever was there; a slot beyond the end drops its row.

    The prefix may have fewer cache slots than the state, and as many tokens of an answer.
    """

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x).at[slots].set(jax.random.key_data(new), mode="drop")
            return jax.random.wrap_key_data(data)
        region = (slots, *(slice(0, size) for size in new.shape[1:]))
        return x.at[region].set(new.astype(x.dtype), mode="drop")

    return jax.tree.map(put, state, prefix)


def empty(prefix: DecodeState, num_rows: int, num_slots: int, config: StepConfig) -> DecodeState:
    """A state of `num_rows` rows that are done, with S = `num_slots`, for prefixes such as this one, or its shapes."""

    def blank(x: Any) -> jax.Array:
        shape = (num_rows, *x.shape[1:])
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), num_rows)
        return jnp.zeros(shape, x.dtype)

    state = jax.tree.map(blank, prefix)
    return dataclasses.replace(
        state,
        tokens=jnp.full_like(state.tokens, PADDING_ID),
        done=jnp.ones(num_rows, bool),
        cache=pad_cache(state.cache, num_slots),
    )
