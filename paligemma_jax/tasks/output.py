"""An answer as it is given back: text, tokens, their scores, and where the time went."""

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of an answer went; rows of one call share all but `new_tokens`.

    compile_s: compiling programs that were not used before.
    prefill_ms: from pixels and ids to the first token, image encoder included; the mean over batches.
    decode_ms_per_token: one step of a whole batch; None when the first token was the last.
    new_tokens: tokens of the answer.
    """

    compile_s: float
    prefill_ms: float
    decode_ms_per_token: float | None
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Output:
    """One answer.

    text: without control tokens.
    tokens: i32 [n], <eos> included when it was reached.
    logprobs: f32 [n], log-probability of each token under the model's unfiltered distribution at temperature 1.
    finish_reason: "eos", "length" when max_new_tokens cut it off, or "stop" at a stop string of `serving`.
    timing: where the time went.
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

    @property
    def mean_logprob(self) -> float | None:
        """Mean of `logprobs` (natural logarithm, <eos> included): how sure the model is of each token; None without."""
        return float(np.mean(self.logprobs, dtype=np.float64)) if len(self.logprobs) else None


class TextStream(Iterator[str]):
    """Pieces of an answer's text, whole characters only; `output` holds the whole answer after the last one."""

    def __init__(self, pieces: Iterator[str | Output]):
        self._pieces = pieces
        self.output: Output | None = None

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Output):
            self.output = piece
            raise StopIteration
        return piece
