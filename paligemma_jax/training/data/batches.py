"""Batches of examples as a function of the step number."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain.python as grain
import numpy as np

from paligemma_jax.errors import ConfigError, DataError, ImageError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.data.ahead import Ahead
from paligemma_jax.training.data.augment import Augmentation, mirrored
from paligemma_jax.training.data.examples import Example
from paligemma_jax.training.data.lengths import measure
from paligemma_jax.training.data.order import Order
from paligemma_jax.training.data.sources import Data

_DEPTH = 1  # batches that are prepared beside the one that is asked for


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch: pixels f32 [I, S, S, 3] of its pictures, and its texts."""

    pixels: np.ndarray
    prefix: str
    suffix: str


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of examples as a function of the step, every epoch in an order of its own.

    All have the same shapes: rows of `num_tokens`, and for each as many pictures as the fullest example has. Of several
    hosts each makes its own rows; one after another they are the batch of a single one, bit for bit, but for image
    slots, which count a host's own pictures.

    parts: examples of each source of `order`.
    batch_size: rows of all hosts together.
    num_answers: tokens of the longest suffix, its end included.
    """

    parts: tuple[Sequence[Example], ...]
    order: Order
    processor: Processor
    num_steps: int
    batch_size: int
    num_tokens: int
    num_pictures: int  # of an example
    num_answers: int
    augmentation: Augmentation | None = None
    num_threads: int = 4
    host_index: int = 0
    host_count: int = 1

    def __len__(self) -> int:
        return self.num_steps

    def rows(self, step: int) -> range:
        """The counters of the examples of this host's rows."""
        mine = self.batch_size // self.host_count
        first = step * self.batch_size + self.host_index * mine
        return range(first, first + mine)

    def examples(self, step: int) -> list[Example]:
        """What this host's rows of a step are made of."""
        return [self.example(counter) for counter in self.rows(step)]

    def example(self, counter: int) -> Example:
        source, index = self.order(counter)
        return self.parts[source][index]

    def row(self, counter: int) -> Row:
        """One example with its pictures, augmented.

        Raises:
          ImageError: a picture cannot be read.
        """
        example = self.example(counter)
        try:
            images = [load_image(picture) for picture in example.images]
        except ImageError as error:
            if all(isinstance(picture, str) for picture in example.images):
                raise
            raise ImageError(f"{example.where}: {error}") from None  # no path says which picture it is
        prefix, suffix = example.prefix, example.suffix
        if self.augmentation is not None:
            images, prefix, suffix = self.augmentation(example, images, counter)
        return Row(np.stack(list(map(self.processor.image_settings.to_pixels, images))), prefix, suffix)

    @functools.cached_property
    def _ahead(self) -> Ahead[Row]:
        return Ahead(self.row, self.rows, self.num_steps, self.num_threads, _DEPTH)

    def __call__(self, step: int) -> dict[str, Any]:
        """Arrays of this host's rows.

        pixels f32 [R * I, S, S, 3], those of a row together, zeros where it has fewer than I; the rest as in
        `processing.processor.Batch`.
        """
        rows, most = self._ahead(step), self.num_pictures
        groups = [range(i * most, i * most + len(row.pixels)) for i, row in enumerate(rows)]
        prefixes, suffixes = [row.prefix for row in rows], [row.suffix for row in rows]
        batch = self.processor.layout(groups, prefixes, suffixes, pad_to=self.num_tokens)
        pixels = np.zeros((len(rows), most, *rows[0].pixels.shape[1:]), np.float32)
        for place, row in zip(pixels, rows, strict=True):
            place[: len(row.pixels)] = row.pixels
        return {**vars(batch), "pixels": pixels.reshape(-1, *pixels.shape[2:])}


def make_batches(
    examples: Sequence[Example],
    processor: Processor,
    *,
    batch_size: int,
    epochs: int,
    text_length: int,
    seed: int,
    augmentation: Augmentation | None = None,
    num_threads: int = 4,
    host_index: int = 0,
    host_count: int = 1,
) -> Batches:
    """Lay out training.

    Args:
      examples: of `open_data`, whose weights count, or any others.
      batch_size: rows of all hosts together.
      num_threads: that decode pictures.

    Raises:
      DataError: an example, the first such one is named, has more than `text_length` tokens of bos, prefix, line break,
        suffix and eos; or the examples are too few for a batch, or their pictures too many for the model.
      ConfigError: the batch cannot be shared out evenly.
    """
    if batch_size % host_count:
        raise ConfigError(f"batch_size={batch_size} is not divisible by {host_count} hosts: give a multiple of it")
    mirrors = augmentation is not None and augmentation.flips
    lengths = measure(examples, processor, text_length, mirrored if mirrors else None)
    parts = examples.parts if isinstance(examples, Data) else (examples,)
    weights = examples.weights if isinstance(examples, Data) else (Fraction(1),)
    order = Order(tuple(map(len, parts)), weights, seed)
    if (shown := order.num_examples(epochs)) < batch_size:
        of_weights = "" if set(weights) == {1} else ", by their weights,"
        raise DataError(
            f"{len(examples)} examples{of_weights} and epochs={epochs} do not fill one batch of {batch_size}: "
            "lower batch_size"
        )
    num_tokens = lengths.num_pictures * processor.config.vision.num_tokens + text_length
    limit = processor.config.text.max_positions
    if num_tokens > limit:
        raise DataError(
            f"{lengths.num_pictures} pictures in one example and text_length={text_length} make {num_tokens} tokens, "
            f"the model has {limit} positions: lower one of them"
        )
    sizes = (shown // batch_size, batch_size, num_tokens, lengths.num_pictures, lengths.num_answers)
    return Batches(parts, order, processor, *sizes, augmentation, num_threads, host_index, host_count)


def shuffled(examples: Sequence[Any], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Lists of `batch_size` examples by the step, every epoch in an order of its own; a remainder is left out."""
    order = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
    return order.batch(batch_size, drop_remainder=True, batch_fn=list)
