"""The grammar of answers to `detect` and `segment` as a table of nodes: which tokens may come next.

An answer is empty, or objects joined by " ; ": four locations with y0 <= y1 and x0 <= x1, for `segment` 16 mask codes,
and one of the labels that the prompt asks for. Everything is written with the tokens that the models were trained on.
An object is begun only if there is room to end it.

Axes: B rows, S nodes, C single ids of a node, M sequences that run at once, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from paligemma_jax.tasks.classes import class_names
from paligemma_jax.tasks.detection import NUM_CODES, is_label

_NUM_CODES = {"detect": 0, "segment": NUM_CODES}  # of an object
_FREE, _END, _WHOLE, _BEGIN = range(4)  # nodes: without a grammar, behind <eos>, a whole answer, an object
_NONE = -1
_FIELDS = 5  # numbers of a node before those of its single ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grammar:
    """One table per row of a batch.

    table: i32 [B, S, 5 + 3 C], a node's numbers side by side, so that a step looks them up once; see `Choices`.
    limit: i32 [], most tokens of an answer.
    """

    table: jax.Array
    limit: jax.Array


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a node allows: a range of ids and some single ids.

    low, high: i32 [M], the range, `high` excluded.
    after: i32 [M], the node behind the range.
    rest: i32 [M], how many tokens an answer needs at least from there to its end.
    side: i32 [M], what a location is: 0 and 1 for y0 and x0, 2 and 3 for y1 and x1, which are at least as large.
    single: i32 [M, C], the single ids, -1 for none.
    behind, rests: i32 [M, C], the node behind each, and what an answer needs from there.
    """

    low: jax.Array
    high: jax.Array
    after: jax.Array
    rest: jax.Array
    side: jax.Array
    single: jax.Array
    behind: jax.Array
    rests: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where sequences stand in their grammars.

    row: i32 [M], of the grammar.
    node: i32 [M].
    corner: i32 [M, 2], the ids of the last y0 and x0.
    """

    row: jax.Array
    node: jax.Array
    corner: jax.Array


@dataclasses.dataclass
class _Node:
    span: tuple[int, int] = (0, 0)
    after: int = _FREE
    side: int = _NONE
    choices: dict[int, int] = dataclasses.field(default_factory=dict)


def build(tokenizer: Tokenizer, prompts: Sequence[str], config: PaliGemmaConfig, limit: int) -> Grammar | None:
    """The grammars of some prompts for answers of at most `limit` tokens; other prompts are free.

    None when no prompt has a grammar. S and C are powers of two, so that few programs are compiled.
    """
    if not any(map(class_names, prompts)):
        return None
    known = {prompt: _nodes(tokenizer, prompt, config.eos_token_id, config.image_token_id) for prompt in prompts}
    tables = [known[prompt] for prompt in prompts]
    num_nodes = power_of_two(max(32, *map(len, tables)))
    num_single = power_of_two(max(4, *(len(node.choices) for table in tables for node in table)))
    packed = np.zeros((len(tables), num_nodes, _FIELDS + 3 * num_single), np.int32)
    packed[:, :, _FIELDS : _FIELDS + num_single] = _NONE
    for row, table in enumerate(tables):
        rest = _tokens_to_the_end(table)
        for i, node in enumerate(table):
            packed[row, i, :_FIELDS] = *node.span, node.after, rest[node.after], node.side
            single = packed[row, i, _FIELDS:].reshape(3, num_single)[:, : len(node.choices)]
            single[:] = list(node.choices), list(node.choices.values()), [rest[j] for j in node.choices.values()]
    return Grammar(jnp.asarray(packed), np.int32(limit))  # moved to the device once


def start(grammar: Grammar | None, count: int) -> Place | None:
    """Where the answers of `count` rows begin."""
    if grammar is None:
        return None
    # A row without a grammar allows nothing at the node of a whole answer.
    node = jnp.where(grammar.table[:, _WHOLE, 1] > 0, _WHOLE, _FREE)
    return Place(jnp.arange(count), node, jnp.zeros((count, 2), jnp.int32))


def allow(grammar: Grammar, place: Place, step: jax.Array, logits: jax.Array) -> jax.Array:
    """Logits [M, V] with -inf for what may not come next, after `step` tokens, one number or one per sequence [M]."""
    node = _at(grammar, place)
    left = grammar.limit - 1 - jnp.broadcast_to(step, place.node.shape)
    least = jnp.where(node.side == 2, place.corner[:, 0], jnp.where(node.side == 3, place.corner[:, 1], node.low))
    high = jnp.where(left >= node.rest, node.high, 0)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    in_range = (ids >= least[:, None]) & (ids < high[:, None])
    fits = (left[:, None] >= node.rests) & (node.single >= 0)
    single = jnp.where(fits, node.single, logits.shape[1])  # beyond the end: dropped
    rows = lax.broadcasted_iota(jnp.int32, single.shape, 0)
    return jnp.where(in_range.at[rows, single].set(True, mode="drop"), logits, -jnp.inf)


def move(grammar: Grammar, place: Place, tokens: jax.Array) -> Place:
    """Where sequences stand after one more token each [M], which the grammar allows."""
    node = _at(grammar, place)
    in_range = (tokens >= node.low) & (tokens < node.high)
    behind = jnp.sum(jnp.where(node.single == tokens[:, None], node.behind, 0), axis=1)
    is_corner = (node.side[:, None] == jnp.arange(2)[None]) & in_range[:, None]
    corner = jnp.where(is_corner, tokens[:, None], place.corner)
    return Place(place.row, jnp.where(in_range, node.after, behind), corner)


def _at(grammar: Grammar, place: Place) -> Choices:
    numbers = grammar.table[place.row, place.node]
    return Choices(*numbers[:, :_FIELDS].T, *jnp.split(numbers[:, _FIELDS:], 3, axis=1))


def _nodes(tokenizer: Tokenizer, prompt: str, eos: int, num_allowed: int) -> list[_Node]:
    """The table of one prompt."""
    free = _Node((0, num_allowed), _FREE)
    table = [free, _Node(free.span, _END), _Node(), _Node()]
    if not class_names(prompt):
        return table
    labels = [name for name in class_names(prompt) if is_label(name)]
    if not labels:  # none can be written: the answer is empty
        table[_WHOLE] = _Node((eos, eos + 1), _END)
        return table
    locs = tokenizer.loc_start, tokenizer.loc_start + len(LOC_TOKENS)
    segs = tokenizer.seg_start, tokenizer.seg_start + len(SEG_TOKENS)
    spans = [(locs, side) for side in (1, 2, 3)] + [(segs, _NONE)] * _NUM_CODES[prompt.split()[0]]
    table[_BEGIN] = _Node(locs, len(table), 0)
    table[_WHOLE] = _Node(locs, len(table), 0, {eos: _END})
    for span, side in spans:
        table.append(_Node(span, len(table) + 1, side))
    table.append(_Node())
    root = len(table) - 1
    for label in labels:
        for text, end, target in ((f" {label}", [eos], _END), (f" {label} ; ", [], _BEGIN)):
            _add(table, root, [*tokenizer.encode(text), *end], target)
    return table


def _add(table: list[_Node], node: int, tokens: Sequence[int], target: int) -> None:
    """Let `tokens` lead from a node to another one, along what is there already."""
    *path, last = tokens
    for token in path:
        if token not in table[node].choices:
            table.append(_Node())
            table[node].choices[token] = len(table) - 1
        node = table[node].choices[token]
    table[node].choices.setdefault(last, target)


def _tokens_to_the_end(table: list[_Node]) -> list[int]:
    """Of each node; 0 where an answer may end at any time."""
    rest = [0 if i in (_FREE, _END) else 10**6 for i in range(len(table))]
    before: list[int] = []
    while rest != before:
        before = rest.copy()
        for i, node in reversed(list(enumerate(table))):
            ways = [rest[target] for target in node.choices.values()]
            ways += [rest[node.after]] * (node.span[1] > node.span[0])
            rest[i] = min([rest[i], *(1 + way for way in ways)])
    return rest
