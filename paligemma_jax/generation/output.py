"""What a generation gives back."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from paligemma_jax.generation.clock import Timing


@dataclasses.dataclass(frozen=True)
class Output:
    """One answer.

    text: without control tokens.
    tokens: i32 [n], <eos> included when it was reached.
    logprobs: f32 [n], log-probability of each token under the model's unfiltered distribution at temperature 1.
    finish_reason: "eos", or "length" when max_new_tokens cut it off.
    near: f32 [n], of a location token the probability of all that are within `sampling.NEAR` of it, else 0.
    expected: f32 [n], the mean location, 0..1023, under the model's distribution over locations at that token.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    timing: Timing
    near: np.ndarray
    expected: np.ndarray


class TextStream(Iterator[str]):
    """Pieces of an answer's text, whole characters only; after the last one, `output` holds the whole answer."""

    def __init__(self, pieces: Iterator[str | Output]):
        self._pieces = pieces
        self.output: Output | None = None

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Output):
            self.output = piece
            raise StopIteration
        return piece


@dataclasses.dataclass(frozen=True)
class Trace:
    """The inside of one prompt with its answer. Axes: T positions, L layers, I pictures, N patches, D decoder width.

    tokens: i32 [T], pictures, prompt, answer and <eos>.
    patches: i32 [T], which of the I * N patches stands at a position, -1 for text.
    prefix_length: how many positions come before the answer.
    soft_tokens: [I, N, D].
    hidden: [L + 1, T, D], what enters each layer, and what leaves the last one, before the final norm.
    attention: f32 [L, heads, n, T], what the position that gives answer token i makes of each position; sums to one.
    logprobs: f32 [n], of the answer's tokens.
    """

    tokens: np.ndarray
    patches: np.ndarray
    prefix_length: int
    soft_tokens: jax.Array
    hidden: jax.Array
    attention: np.ndarray
    logprobs: np.ndarray
