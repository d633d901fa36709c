"""The grammar of answers to `detect` and `segment` as a table of nodes: which tokens may come next.

An answer is empty, or objects joined by " ; ": four locations with y0 <= y1 and x0 <= x1, for `segment` 16 mask codes,
and one of the labels that the prompt asks for. Everything is written with the tokens that the models were trained on.
An object is begun only if there is room to end it. Where the prompt has a form of its own (`Prompt.is_bare`), objects
may do without a label, and then without anything between them.

Axes: B rows, S nodes, C single ids of a node, F = 5 + 3 C numbers of a node, M sequences (B n of them: n per row, one
after the other), V vocabulary.
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
from paligemma_jax.tasks.prompts import Prompt
from paligemma_jax.tasks.reading import is_label

_FREE, _END, _WHOLE, _BEGIN = range(4)  # nodes: without a grammar, behind <eos>, a whole answer, an object
_NONE = -1
_FIELDS = 5  # numbers of a node before those of its single ids


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
class Position:
    """Where sequences stand in their rows' grammars.

    node: i32 [M].
    corner: i32 [M, 2], the ids of the last y0 and x0.
    """

    node: jax.Array
    corner: jax.Array


@dataclasses.dataclass
class _Node:
    span: tuple[int, int] = (0, 0)
    after: int = _FREE
    side: int = _NONE
    choices: dict[int, int] = dataclasses.field(default_factory=dict)


def tables(
    tokenizer: Tokenizer, prompts: Sequence[Prompt | None], config: PaliGemmaConfig, min_nodes: int = 32
) -> np.ndarray:
    """One table of nodes per prompt, i32 [B, S, F]; None and prompts without labels are free.

    A node's numbers lie side by side, so that a step looks them up once; see `Choices`. S, at least `min_nodes`, and C
    are powers of two, so that few programs are compiled.
    """
    known = {prompt: _nodes(tokenizer, prompt, config) for prompt in prompts}
    found = [known[prompt] for prompt in prompts]
    num_nodes = power_of_two(max(min_nodes, *map(len, found)))
    num_single = power_of_two(max(4, *(len(node.choices) for nodes in found for node in nodes)))
    packed = np.zeros((len(found), num_nodes, _FIELDS + 3 * num_single), np.int32)
    packed[:, :, _FIELDS : _FIELDS + num_single] = _NONE
    for row, nodes in enumerate(found):
        rest = _tokens_to_the_end(nodes)
        for i, node in enumerate(nodes):
            packed[row, i, :_FIELDS] = *node.span, node.after, rest[node.after], node.side
            single = packed[row, i, _FIELDS:].reshape(3, num_single)[:, : len(node.choices)]
            single[:] = list(node.choices), list(node.choices.values()), [rest[j] for j in node.choices.values()]
    return packed


def start(table: jax.Array) -> Position:
    """Where the answers of the rows of a table [B, S, F] begin."""
    # A free row allows nothing at the node of a whole answer.
    node = jnp.where(table[:, _WHOLE, 1] > 0, _WHOLE, _FREE)
    return Position(node, jnp.zeros((len(table), 2), jnp.int32))


def allow(table: jax.Array, position: Position, left: jax.Array, logits: jax.Array) -> jax.Array:
    """Logits [M, V] with -inf for what may not come next, when `left` [M] more tokens fit behind the next one."""
    node = _at(table, position)
    least = jnp.where(node.side == 2, position.corner[:, 0], jnp.where(node.side == 3, position.corner[:, 1], node.low))
    high = jnp.where(left >= node.rest, node.high, 0)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    in_range = (ids >= least[:, None]) & (ids < high[:, None])
    fits = (left[:, None] >= node.rests) & (node.single >= 0)
    single = jnp.where(fits, node.single, logits.shape[1])  # beyond the end: dropped
    rows = lax.broadcasted_iota(jnp.int32, single.shape, 0)
    return jnp.where(in_range.at[rows, single].set(True, mode="drop"), logits, -jnp.inf)


def advance(table: jax.Array, position: Position, tokens: jax.Array) -> Position:
    """Where sequences stand after one more token each [M], which the grammar allows."""
    node = _at(table, position)
    in_range = (tokens >= node.low) & (tokens < node.high)
    behind = jnp.sum(jnp.where(node.single == tokens[:, None], node.behind, 0), axis=1)
    is_corner = (node.side[:, None] == jnp.arange(2)[None]) & in_range[:, None]
    corner = jnp.where(is_corner, tokens[:, None], position.corner)
    return Position(jnp.where(in_range, node.after, behind), corner)


def _at(table: jax.Array, position: Position) -> Choices:
    count = len(position.node)
    rows = jnp.arange(count) // (count // len(table))
    numbers = table[rows, position.node]
    return Choices(*numbers[:, :_FIELDS].T, *jnp.split(numbers[:, _FIELDS:], 3, axis=1))


def _nodes(tokenizer: Tokenizer, prompt: Prompt | None, config: PaliGemmaConfig) -> list[_Node]:
    """The nodes of one prompt."""
    free = _Node((0, config.text_ids[-1][1]), _FREE)
    ends = dict.fromkeys(config.eos_token_ids, _END)
    table = [free, _Node(free.span, _END), _Node(), _Node()]
    if prompt is None or not prompt.labels:
        return table
    labels = [label for label in prompt.labels if is_label(label)]
    if not labels and not prompt.is_bare:  # none can be written: the answer is empty
        table[_WHOLE] = _Node((config.eos_token_id, config.eos_token_id + 1), _END, choices=ends)
        return table
    locs = tokenizer.loc_start, tokenizer.loc_start + len(LOC_TOKENS)
    segs = tokenizer.seg_start, tokenizer.seg_start + len(SEG_TOKENS)
    spans = [(locs, side) for side in (1, 2, 3)] + [(segs, _NONE)] * prompt.task.num_codes
    table[_BEGIN] = _Node(locs, len(table), 0)
    table[_WHOLE] = _Node(locs, len(table), 0, ends)
    for span, side in spans:
        table.append(_Node(span, len(table) + 1, side))
    table.append(dataclasses.replace(table[_BEGIN], choices={}) if prompt.is_bare else _Node())
    root = len(table) - 1
    for words in [""] * prompt.is_bare + [f" {label}" for label in labels]:
        for eos in ends:
            _add(table, root, [*tokenizer.encode(words), eos], _END)
        _add(table, root, tokenizer.encode(f"{words} ; "), _BEGIN)
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
