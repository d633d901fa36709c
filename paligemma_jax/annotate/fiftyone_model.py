"""A model for FiftyOne: boxes, and masks, of named things in the samples of a dataset."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

import paligemma_jax as pj
from paligemma_jax.annotate.exports import fiftyone_box
from paligemma_jax.errors import ConfigError, PromptError
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.overlap import clip_box

try:
    import fiftyone as fo
    from fiftyone.core.models import Model
except ImportError:
    raise ConfigError('a FiftyOne model needs fiftyone: pip install -e ".[fiftyone]"') from None

TASKS = ("detect", "segment")


class FiftyOneModel(Model):
    """Finds things in pictures: `dataset.apply_model(FiftyOneModel(model, "cat ; dog"), "found", batch_size=16)`.

    Args:
      model: best loaded with `batch_size` as that of `apply_model`.
      classes: "cat ; dog", or a list of names.
      task: "detect", or "segment" for instance masks too.
      options: of `PaliGemma.locate`, such as `min_score` and `max_new_tokens`.

    Raises:
      PromptError: another task.
      CheckpointError: no mask decoder to segment with.
    """

    media_type = "image"
    ragged_batches = False  # pictures of several sizes may be given at once
    transforms = None
    preprocess = False
    config = None

    def __init__(self, model: pj.PaliGemma, classes: str | Iterable[str], task: str = "detect", **options: Any):
        if task not in TASKS:
            raise PromptError(f"task={task!r} is not possible: give one of {', '.join(TASKS)}")
        if task == "segment":
            model.mask_decoder()  # its absence is known before the long part
        self._model, self._task, self._options = model, task, options
        self._classes = classes if isinstance(classes, str) else list(classes)

    def predict(self, arg: np.ndarray) -> fo.Detections:
        """The objects of a picture u8 [H, W, 3]."""
        return self.predict_all([arg])[0]

    def predict_all(self, args: Iterable[np.ndarray]) -> list[fo.Detections]:
        """The objects of each picture, looked at in one batch."""
        found = self._model.locate(self._task, list(args), self._classes, **self._options)
        return [fo.Detections(detections=[_detection(item, each.size) for item in each]) for each in found]


def _detection(item: Detection, size: tuple[int, int]) -> fo.Detection:
    """An object as FiftyOne has it: its box as shares of the sides, and a mask of the box alone."""
    fields: dict[str, Any] = {} if item.score is None else {"confidence": item.score}
    if item.mask is not None:
        x0, y0, x1, y1 = clip_box(item.box, size)
        fields["mask"] = item.mask[_pixels(y0, y1, size[1]), _pixels(x0, x1, size[0])]
    return fo.Detection(label=item.label, bounding_box=fiftyone_box(item.box, size), **fields)


def _pixels(low: float, high: float, size: int) -> slice:
    """The pixels that an interval touches; at least one."""
    first = min(math.floor(low), size - 1)
    return slice(first, max(first + 1, math.ceil(high)))
