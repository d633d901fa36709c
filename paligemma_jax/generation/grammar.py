"""The grammar of answers to `detect` and `segment` as a table of nodes: which tokens may come next.

An answer is empty, or objects joined by " ; ": four locations with y0 <= y1 and x0 <= x1, for `segment` 16 mask codes,
and one of the labels that the prompt asks for. Everything is written with the tokens that the models were trained on.
An object is begun only if there is room to end it.

Axes: B rows, S nodes, C single choices of a node, M sequences that run at once, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from paligemma_jax.tasks.classes import class_names
from paligemma_jax.tasks.detection import NUM_CODES

_NUM_CODES = {"detect": 0, "segment": NUM_CODES}  # of an object
_FREE, _END, _EMPTY, _BEGIN = range(4)  # nodes: of rows without a grammar, behind <eos>, of a whole answer, an object
_NONE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grammar:
    """One table per row. A node allows a range of ids, and some single ids.

    low, high: i32 [B, S], the range, `high` excluded.
    after: i32 [B, S], the node behind the range.
    side: i32 [B, S], what a location is: 0 and 1 for y0 and x0, 2 and 3 for y1 and x1, which are at least as large.
    choices, behind: i32 [B, S, C], the single ids, -1 for none, and the node behind each.
    rest: i32 [B, S], how many tokens an answer needs at least from a node to its end.
    limit: i32 [], most tokens of an answer.
    """

    low: jax.Array
    high: jax.Array
    after: jax.Array
    side: jax.Array
    choices: jax.Array
    behind: jax.Array
    rest: jax.Array
    limit: jax.Array


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
    tables = [_nodes(tokenizer, prompt, config.eos_token_id, config.image_token_id) for prompt in prompts]
    num_nodes = _power_of_two(max(32, *map(len, tables)))
    num_choices = _power_of_two(max(4, *(len(node.choices) for table in tables for node in table)))
    shape = len(tables), num_nodes
    low, high, after, rest = (np.zeros(shape, np.int32) for _ in range(4))
    side = np.full(shape, _NONE, np.int32)
    choices, behind = np.full((*shape, num_choices), _NONE, np.int32), np.zeros((*shape, num_choices), np.int32)
    for row, table in enumerate(tables):
        rest[row, : len(table)] = _tokens_to_the_end(table)
        for i, node in enumerate(table):
            (low[row, i], high[row, i]), after[row, i], side[row, i] = node.span, node.after, node.side
            choices[row, i, : len(node.choices)] = list(node.choices)
            behind[row, i, : len(node.choices)] = list(node.choices.values())
    return Grammar(low, high, after, side, choices, behind, rest, np.int32(limit))


def start(grammar: Grammar | None, count: int) -> Place | None:
    """Where the answers of `count` rows begin."""
    if grammar is None:
        return None
    row = jnp.arange(count)
    # A row without a grammar has nothing at the node of an empty answer.
    node = jnp.where(grammar.high[:, _EMPTY] > 0, _EMPTY, _FREE)
    return Place(row, node, jnp.zeros((count, 2), jnp.int32))


def allow(grammar: Grammar, place: Place, step: jax.Array, logits: jax.Array) -> jax.Array:
    """Logits [M, V] with -inf for what may not come next, after `step` tokens, one number or one per sequence [M]."""
    low, high, after, side, choices, behind = _at(grammar, place)
    left = grammar.limit - 1 - jnp.broadcast_to(step, place.node.shape)
    fits = left >= grammar.rest[place.row, after]
    least = jnp.where(side == 2, place.corner[:, 0], jnp.where(side == 3, place.corner[:, 1], low))
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    allowed = (ids >= least[:, None]) & (ids < high[:, None]) & fits[:, None]
    fits = left[:, None] >= grammar.rest[place.row[:, None], behind]
    single = jnp.where(fits & (choices >= 0), choices, logits.shape[1])  # beyond the end: dropped
    rows = lax.broadcasted_iota(jnp.int32, choices.shape, 0)
    return jnp.where(allowed.at[rows, single].set(True, mode="drop"), logits, -jnp.inf)


def move(grammar: Grammar, place: Place, tokens: jax.Array) -> Place:
    """Where sequences stand after one more token each [M], which the grammar allows."""
    low, high, after, side, choices, behind = _at(grammar, place)
    is_choice = choices == tokens[:, None]
    chosen = jnp.sum(jnp.where(is_choice, behind, 0), axis=1)
    in_range = (tokens >= low) & (tokens < high)
    node = jnp.where(in_range, after, chosen)
    keep = (side[:, None] != jnp.arange(2)[None]) | ~in_range[:, None]
    return Place(place.row, node, jnp.where(keep, place.corner, tokens[:, None]))


def _at(grammar: Grammar, place: Place) -> tuple[jax.Array, ...]:
    tables = (grammar.low, grammar.high, grammar.after, grammar.side, grammar.choices, grammar.behind)
    return tuple(table[place.row, place.node] for table in tables)


def _nodes(tokenizer: Tokenizer, prompt: str, eos: int, num_allowed: int) -> list[_Node]:
    """The table of one prompt."""
    free = _Node((0, num_allowed), _FREE)
    table = [free, _Node(free.span, _END), _Node(), _Node()]
    labels = class_names(prompt)
    if not labels:
        return table
    locs = tokenizer.loc_start, tokenizer.loc_start + len(LOC_TOKENS)
    segs = tokenizer.seg_start, tokenizer.seg_start + len(SEG_TOKENS)
    spans = [(locs, side) for side in (1, 2, 3)] + [(segs, _NONE)] * _NUM_CODES[prompt.split()[0]]
    table[_BEGIN] = _Node(locs, len(table), 0)
    table[_EMPTY] = _Node(locs, len(table), 0, {eos: _END})
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


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
