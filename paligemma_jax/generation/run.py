"""One call on its way: rows that run at once, and which of the ways to choose tokens answers them.

Axes: I pictures, N soft tokens of a picture, B rows, D decoder width.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation import beam, engine, grammar, speculation
from paligemma_jax.generation.clock import Clock
from paligemma_jax.generation.sampling import Sampling, row_keys
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer

BATCH_SIZE = 16  # rows that run at once


@dataclasses.dataclass(frozen=True)
class Choosing:
    """How tokens are chosen; the arguments of `PaliGemma.generate`."""

    max_new_tokens: int
    sampling: Sampling
    speculate: bool | None
    constrain: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """Prompts that are laid out, with their pictures embedded."""

    config: PaliGemmaConfig
    tokenizer: Tokenizer
    batch: Batch
    soft_tokens: jax.Array  # [I, N, D]
    clock: Clock

    def groups(self, batch_size: int = BATCH_SIZE) -> Iterator[tuple[range, engine.Inputs]]:
        """The rows that run at once, in turn."""
        count, num_tokens = self.batch.tokens.shape
        size = min(batch_size, engine.most_at_once(num_tokens))
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            yield rows, engine.prepare(self.batch, self.soft_tokens, rows)

    def answers(
        self, params: engine.Params, choosing: Choosing, batch_size: int
    ) -> Iterator[tuple[range, Iterator[engine.Chunk]]]:
        """Rows that run at once, and their tokens as they come."""
        keys = self._row_keys(choosing.sampling.seed)
        for rows, inputs in self.groups(batch_size):
            yield rows, self._chunks(params, inputs, keys[rows.start : rows.stop], choosing)

    def _row_keys(self, seed: int) -> jax.Array:
        """Random keys [B] of the rows; copies of a prompt about the same picture get different ones."""
        rows = zip(self.batch.tokens, self.batch.image_slots, strict=True)
        return row_keys(seed, [(ids.tobytes(), slots.tobytes()) for ids, slots in rows])

    def _chunks(
        self, params: engine.Params, inputs: engine.Inputs, keys: jax.Array, choosing: Choosing
    ) -> Iterator[engine.Chunk]:
        sampling, limit = choosing.sampling, choosing.max_new_tokens
        prompts = engine.prompts(self.tokenizer, inputs)
        allowed = grammar.build(self.tokenizer, prompts, self.config, limit) if choosing.constrain else None
        loc_start = np.int32(self.tokenizer.loc_start)
        rule = dataclasses.replace(sampling.rule(), loc_start=loc_start, grammar=allowed)
        limits = (limit, _chunk(), self.clock)
        if sampling.num_beams > 1:
            return iter([beam.search(params, self.config, inputs, sampling.num_beams, rule, *limits)])
        keys = keys[np.resize(np.arange(len(keys)), len(inputs.tokens))]  # those of the padding do not matter
        arguments = (params, self.config, inputs, keys, rule, *limits)
        hints = speculation.hints(self.tokenizer, prompts)
        if num_guesses := speculation.choose_num_guesses(params, hints, choosing.speculate):
            return speculation.generate(*arguments, hints, num_guesses)
        return engine.generate(*arguments)


def _chunk() -> int:
    """Decode steps between two looks at what is done: on CPU a step is dear and a look is cheap."""
    return 2 if jax.default_backend() == "cpu" else 8
