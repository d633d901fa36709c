"""How sure a model is of the objects in its answer.

The score of an object is the probability of its box times that of its label:

    (near(y0) near(x0) near(y1) near(x1)) ** (1/4) * p(label)

near(c) is the probability, at the token that says c, of all locations within `engine.sampling.NEAR` of it: one exact
location of 1024 is never likely, however sure the model is of an edge. p(label) is the product of the probabilities of
the label's tokens, 1 where the answer has none. All are the model's own, whatever was drawn or allowed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, StreamDecoder, Tokenizer
from paligemma_jax.tasks.detection import Detection, parse, to_box


class Scored(Protocol):
    """An answer with the scores of its tokens, as `tasks.output.Output`."""

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    near: np.ndarray
    expected: np.ndarray
    finish_reason: str


def read_objects(
    output: Scored, tokenizer: Tokenizer, size: tuple[int, int], loc_scale: int = 1023, labels: Sequence[str] = ()
) -> tuple[list[Detection], list[str]]:
    """The objects of an answer with their scores, and the text of each incomplete one; arguments as for `parse`."""
    found, dropped = parse(output.text, size, loc_scale, labels)
    return score(found, output, tokenizer, size, loc_scale), dropped


def words_logprob(output: Scored, tokenizer: Tokenizer) -> float | None:
    """Mean log-probability of an answer's tokens, <eos> among them, without locations and mask codes; None without.

    Of 1024 locations none is likely, however sure the model is: the score of an object tells about its box.
    """
    is_word = ~(_is_loc(output.tokens, tokenizer) | _is_seg(output.tokens, tokenizer))
    return float(np.mean(output.logprobs[is_word], dtype=np.float64)) if is_word.any() else None


def score(
    found: Sequence[Detection],
    output: Scored,
    tokenizer: Tokenizer,
    size: tuple[int, int],
    loc_scale: int = 1023,
) -> list[Detection]:
    """The objects with their scores, the probability of each side of their box, and their expected box.

    Args:
      found: what `parse` found in the output's text, with the same `size` and `loc_scale`. An object whose locations
        are spelled in letters instead of tokens stays without.
    """
    decoder = StreamDecoder(tokenizer)
    ends = np.cumsum([len(decoder.feed(token)) for token in output.tokens])  # in the text, of each token
    if output.finish_reason == "eos":
        ends[-1] = len(output.text) + 1  # <eos> is not in the text, and no part of the last object
    return [_scored(item, output, tokenizer, ends, size, loc_scale) for item in found]


def _scored(
    item: Detection, output: Scored, tokenizer: Tokenizer, ends: np.ndarray, size: tuple[int, int], loc_scale: int
) -> Detection:
    begin, end = item.span
    inside = np.flatnonzero((ends > begin) & (ends <= end))
    is_loc, is_seg = (is_kind(output.tokens[inside], tokenizer) for is_kind in (_is_loc, _is_seg))
    sides = inside[is_loc]
    if len(sides) != 4:
        return item
    coded = np.flatnonzero(is_loc | is_seg)
    label = np.concatenate([inside[: coded[0]], inside[coded[-1] + 1 :]])  # behind the box, or in front of it
    probability = np.prod(output.near[sides]) ** 0.25 * np.exp(output.logprobs[label].sum())
    y0, x0, y1, x1 = (float(p) for p in np.exp(output.logprobs[sides]))
    tokens = output.tokens[sides]
    y0, y1 = _in_order(tokens[0::2], y0, y1)
    x0, x1 = _in_order(tokens[1::2], x0, x1)
    return dataclasses.replace(
        item,
        score=float(min(probability, 1.0)),
        side_probabilities=(x0, y0, x1, y1),
        expected_box=to_box(output.expected[sides], size, loc_scale),
    )


def _is_loc(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return (tokens >= tokenizer.loc_start) & (tokens < tokenizer.loc_start + len(LOC_TOKENS))


def _is_seg(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return (tokens >= tokenizer.seg_start) & (tokens < tokenizer.seg_start + len(SEG_TOKENS))


def _in_order(locations: np.ndarray, first: float, second: float) -> tuple[float, float]:
    """What belongs to two opposite sides, turned around where `parse` turns the sides."""
    return (second, first) if locations[0] > locations[1] else (first, second)
