"""What a client hears of its answer, and what a server counts: plain values."""

import dataclasses

import numpy as np

from paligemma_jax.serving.shown import TopLogprobs
from paligemma_jax.tasks.output import Output


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer, as it grows.

    text: whole characters only, never a part of a stop string; may be empty while tokens come.
    tokens: i32 [n], those since the last piece, <eos> included.
    logprobs: f32 [n].
    top: the most likely tokens in the place of each [n, K], where they were asked for.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    top: TopLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of an answer that came to an end.

    output: the whole answer. Its text ends before a stop string, its tokens with the one that completed it.
    reason: "eos", "length" or "stop".
    queue_s, first_token_s, total_s: seconds since the request was submitted until it had a slot, until its first token,
      and until its last one.
    top: the most likely tokens in the place of each token [n, K], where they were asked for.
    """

    output: Output
    reason: str
    queue_s: float
    first_token_s: float
    total_s: float
    top: TopLogprobs | None = None


Event = Piece | Finished


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine does now, and has done since it started.

    running, waiting, free_slots: requests and slots now.
    finished: answers by how they ended: eos, length, stop, cancelled, expired, failed.
    compiles_while_serving: programs that were compiled after the engine was ready; more than 0 is a fault.
    prompt_tokens, padded_tokens: prefilled, those of images included, and what they were padded to.
    generation_tokens: of all answers.
    images_embedded, images_reused: how often an image went through the encoder, and how often it need not.
    images_cached, cached_bytes: embedded images that are kept, and their memory.
    """

    running: int
    waiting: int
    free_slots: int
    finished: dict[str, int]
    compiles_while_serving: int
    prompt_tokens: int
    padded_tokens: int
    generation_tokens: int
    images_embedded: int
    images_reused: int
    images_cached: int
    cached_bytes: int
