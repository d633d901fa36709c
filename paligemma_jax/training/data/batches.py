"""Batches of examples as a function of the step number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain.python as grain
import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.data.examples import Example


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of examples as a function of the step, every epoch in an order of its own.

    All have the same shapes: rows of `num_tokens`, and as many pictures as the fullest batch could hold. The longest
    suffix has `num_answers` tokens, its end included.
    """

    order: grain.MapDataset
    processor: Processor
    num_tokens: int
    num_pictures: int
    num_answers: int

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, step: int) -> dict[str, Any]:
        examples: list[Example] = self.order[step]
        batch = self.processor(
            [list(example.images) for example in examples],
            [example.prefix for example in examples],
            [example.suffix for example in examples],
            pad_to=self.num_tokens,
        )
        pixels = np.zeros((self.num_pictures, *batch.pixels.shape[1:]), np.float32)
        pixels[: len(batch.pixels)] = batch.pixels
        return {**vars(batch), "pixels": pixels}


def make_batches(
    examples: list[Example], processor: Processor, *, batch_size: int, epochs: int, text_length: int, seed: int
) -> Batches:
    """Lay out training.

    Raises:
      DataError: an example, the first such one is named, has more than `text_length` tokens of bos, prefix, line break,
        suffix and eos; or the examples are too few for a batch, or their pictures too many for the model.
    """
    num_answers = 0
    for example in examples:
        row = processor.layout([[0] * len(example.images)], example.prefix, example.suffix)
        count = int(row.length[0]) - len(example.images) * processor.config.vision.num_tokens
        if count > text_length:
            place = f"{example.where}: " if example.where else ""
            raise DataError(
                f"{place}{example.prefix!r:.60} with its suffix has {count} tokens, more than "
                f"text_length={text_length}: raise text_length or shorten it"
            )
        num_answers = max(num_answers, int(row.length[0] - row.prefix_length[0]))
    if len(examples) * epochs < batch_size:
        raise DataError(
            f"{len(examples)} examples and epochs={epochs} do not fill one batch of {batch_size}: lower batch_size"
        )
    most = max(len(example.images) for example in examples)
    num_tokens = most * processor.config.vision.num_tokens + text_length
    limit = processor.config.text.max_positions
    if num_tokens > limit:
        raise DataError(
            f"{most} pictures in one example and text_length={text_length} make {num_tokens} tokens, the model has "
            f"{limit} positions: lower one of them"
        )
    order = shuffled(examples, batch_size, epochs, seed)
    return Batches(order, processor, num_tokens, most * batch_size, num_answers)


def shuffled(examples: Sequence[Any], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Lists of `batch_size` examples by the step, every epoch in an order of its own; a remainder is left out."""
    order = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
    return order.batch(batch_size, drop_remainder=True, batch_fn=list)
