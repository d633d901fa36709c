"""Held-out examples: their loss, and the task's metric on answers that are generated.

Axes: B rows, A answer positions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from paligemma_jax.api import PaliGemma
from paligemma_jax.errors import CheckpointError, DataError
from paligemma_jax.evaluation import Metric
from paligemma_jax.models import mask_vae
from paligemma_jax.models.paligemma import PaliGemma as Network
from paligemma_jax.processing.image import load_image
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import parse
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.output import Output
from paligemma_jax.tasks.reading import read
from paligemma_jax.tasks.segmentation import attach_masks
from paligemma_jax.training.data import Example
from paligemma_jax.training.data.regions import UNIT
from paligemma_jax.training.loss import row_losses
from paligemma_jax.training.samples import Sample

NUM_SAMPLES = 8
_SPARE_TOKENS = 16  # that an answer may have more than the longest right one


class HeldOut:
    """Measures a model on examples.

    Args:
      model: the handle whose geometry, processor and programs are used; its parameters are not.
      examples: read and laid out when this is made, but for their pictures.
      metric: of the answers; None measures the loss alone.
      batch_size: B.

    Raises:
      DataError: there are none, or one does not fit the positions of the model; or the metric is of objects, and no
        example has any, or of masks, and an object has none.
      CheckpointError: the metric is of masks, and the model has no decoder of these.
      ConfigError: the metric needs pycocotools, which is not installed.
    """

    def __init__(self, model: PaliGemma, examples: Sequence[Example], metric: Metric | None, batch_size: int):
        if not examples:
            raise DataError("there are no examples to validate on: give others as val_data")
        if metric is not None and metric.objects and not any(read(example.suffix) for example in examples):
            raise DataError(
                f"metric={metric.name} is of objects, and no suffix of val_data has any: give another metric"
            )
        if metric is not None and metric.needs_pycocotools:
            coco.require()
        if metric is not None and metric.masks:
            model.mask_decoder()
            bare = (e for e in examples if any(item.codes is None for item in parse(e.suffix, UNIT)[0]))
            if (example := next(bare, None)) is not None:
                raise DataError(f"{example.where} has an object without mask codes, which metric={metric.name} needs")
        self._model, self._examples, self._metric = model, list(examples), metric
        self._batch_size = min(batch_size, len(self._examples))
        processor, config = model.processor, model.config
        rows = [processor.layout([[0] * len(e.images)], e.prefix, e.suffix) for e in self._examples]
        self._num_tokens = max(int(row.length[0]) for row in rows)
        self._num_answers = max(int(row.length[0] - row.prefix_length[0]) for row in rows)
        self._num_pictures = max(len(e.images) for e in self._examples) * self._batch_size
        longest, limit = max(int(row.prefix_length[0]) for row in rows), config.text.max_positions
        if self._num_tokens > limit:
            where = self._examples[int(np.argmax([row.length[0] for row in rows]))].where
            raise DataError(
                f"{where}: an example has {self._num_tokens} tokens, the model {limit} positions: shorten it"
            )
        self._max_new_tokens = min(self._num_answers + _SPARE_TOKENS, limit - longest)
        self._losses = jax.jit(functools.partial(row_losses, Network(config), self._num_answers))

    def __call__(self, params: Any, check: Callable[[], None] = lambda: None) -> tuple[dict[str, float], list[Sample]]:
        """Measure parameters of the whole network.

        Args:
          check: called between batches; it may raise.

        Returns:
          `val_loss`, the mean over examples; then, where there is a metric, its main number as `val_` and its name, and
          its others; `val_ended`, the share of answers that ended before they were cut off; and where there are answers
          with boxes, `val_repeats`, the share of these that has a box twice. And the first answers.
        """
        numbers = {"val_loss": self.loss(params, check)}
        if self._metric is None:
            return numbers, []
        outputs = self.answers(params, check)
        texts = [output.text for output in outputs]
        scores = self._metric.score(*self._compared(texts))
        names = [self._metric.name, *list(scores)[1:]]
        numbers |= {f"val_{name}": float(value) for name, value in zip(names, scores.values(), strict=True)}
        numbers["val_ended"] = float(np.mean([output.finish_reason == "eos" for output in outputs]))
        boxes = [found for text in texts if (found := [(item.locs, item.label) for item in read(text) if item.locs])]
        if boxes:
            numbers["val_repeats"] = float(np.mean([len(set(found)) < len(found) for found in boxes]))
        return numbers, [self._sample(*pair) for pair in zip(self._examples, outputs[:NUM_SAMPLES], strict=False)]

    def loss(self, params: Any, check: Callable[[], None] = lambda: None) -> float:
        """The mean of the examples' losses, without smoothing and dropout."""
        total = 0.0
        for first in range(0, len(self._examples), self._batch_size):
            check()
            rows = self._examples[first : first + self._batch_size]
            filled = [*rows, *rows[:1] * (self._batch_size - len(rows))]  # as many in every batch
            total += float(np.asarray(self._losses(params, self._batch(filled)), np.float64)[: len(rows)].sum())
        return total / len(self._examples)

    def answers(self, params: Any, check: Callable[[], None] = lambda: None) -> list[Output]:
        """The greedy answer to each example."""
        model, outputs = self._model, []
        handle = PaliGemma(model.config, params, model.processor, runner=model.runner)
        for first in range(0, len(self._examples), self._batch_size):
            check()
            rows = self._examples[first : first + self._batch_size]
            images, prompts = [list(row.images) for row in rows], [row.prefix for row in rows]
            outputs += handle.generate(images, prompts, self._max_new_tokens, batch_size=self._batch_size)
        return outputs

    def _compared(self, texts: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """Answers and what is right, as the metric takes them: texts, or objects with masks where these can be made."""
        right = [example.suffix for example in self._examples]
        if not self._metric.objects or not self._has_masks():
            return list(texts), right
        sizes = [load_image(example.images[0]).size for example in self._examples]
        decode = functools.partial(mask_vae.decode, self._model.mask_decoder())

        def objects(text: str, size: tuple[int, int]) -> Detections:
            found = attach_masks(parse(text, size)[0], size, decode)
            return Detections([item for item in found if item.mask is not None or not self._metric.masks], size)

        read_answer = objects if self._metric.read is None else functools.partial(self._metric.read, decode=decode)
        return list(map(read_answer, texts, sizes)), list(map(objects, right, sizes))

    def _has_masks(self) -> bool:
        try:
            self._model.mask_decoder()
        except CheckpointError:
            return False
        return True

    def _batch(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        images, prefixes, suffixes = zip(*((list(e.images), e.prefix, e.suffix) for e in examples), strict=True)
        batch = self._model.processor(list(images), list(prefixes), list(suffixes), pad_to=self._num_tokens)
        pixels = np.zeros((self._num_pictures, *batch.pixels.shape[1:]), np.float32)
        pixels[: len(batch.pixels)] = batch.pixels
        return {**vars(batch), "pixels": pixels}

    def _sample(self, example: Example, output: Output) -> Sample:
        picture = load_image(example.images[0])
        objects = []
        if len(example.images) == 1:  # a box is of one picture
            objects, _ = self._model.objects(output, picture.size, masks=self._has_masks())
        return Sample(picture, example.prefix, example.suffix, output.text, objects)
