"""Boxes and coarse masks of phrases, from their maps over one picture.

Axes: T phrases, R and C rows and columns of a map, H and W in pixels.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit.activation import PhraseMaps
from paligemma_jax.tasks.detection import Detection

_FINER = 8  # points along a side of a patch that is interpolated
_LEAST_AREA = _FINER**2 // 4  # of an object, in points
_TOUCHING = np.ones((3, 3), int)  # points that touch in a corner are connected


def locate(found: PhraseMaps, size: tuple[int, int], threshold: float = 0.5, background: int = 0) -> list[Detection]:
    """The objects that phrases name, in the phrases' order, each phrase's best first.

    Phrases compete for each point of the picture, a patch divided by 8. With l the logits of a phrase, interpolated,
    and x = l - mean l, a phrase claims a point where x is above `threshold` times its highest, and of those that do the
    one with the highest x gets it; where none does there is ground. Points that are connected are one object.

    The score of an object is 1 - (mean activation of the map) / (highest one in the object): near 0 where a map is as
    even as that of a phrase that names nothing in the picture. How near to 1 it comes depends on the models.

    Args:
      found: maps of phrases; of objects that are not wanted too, so that they keep their points.
      size: (width, height) of the picture in pixels.
      threshold: between 0 and 1; higher makes smaller objects.
      background: how many of the last phrases are not wanted.

    Returns:
      Objects with masks, bool [H, W], and the boxes of these in pixels.

    Raises:
      ConfigError: another threshold.
    """
    check_threshold(threshold)
    logits = np.asarray(found.logits, np.float64)
    mean, highest = logits.mean(axis=(1, 2), keepdims=True), logits.max(axis=(1, 2), keepdims=True)
    excess = _interpolated(logits - mean)
    claimed = excess > threshold * (highest - mean)
    owner = np.where(claimed.any(axis=0), np.where(claimed, excess, -np.inf).argmax(axis=0), -1)
    objects = []
    for number, phrase in enumerate(found.phrases[: len(found.phrases) - background]):
        ground = np.log(np.exp(logits[number] - highest[number]).mean()) + highest[number] - mean[number]
        objects += _components(phrase, owner == number, excess[number] - ground, size)
    return objects


def check_threshold(threshold: float) -> None:
    """ConfigError for one that is not between 0 and 1."""
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold={threshold} is not possible: give a number between 0 and 1")


def _components(phrase: str, owned: np.ndarray, contrast: np.ndarray, size: tuple[int, int]) -> list[Detection]:
    """An object for each connected part of a phrase's points; `contrast` is log(activation / mean activation)."""
    parts, count = ndimage.label(owned, _TOUCHING)
    objects = []
    for number in range(1, count + 1):
        part = parts == number
        mask = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.NEAREST))
        if part.sum() >= _LEAST_AREA and mask.any():  # in a picture of a few pixels a part may have none
            score = max(0.0, 1 - float(np.exp(-contrast[part].max())))
            objects.append(Detection(phrase, _box(mask), score, mask=mask))
    return sorted(objects, key=lambda item: -item.score)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _interpolated(values: np.ndarray) -> np.ndarray:
    """Maps [T, R, C] at 8 points along each side of a patch, linear between the centres of patches."""
    for axis in (1, 2):
        length = values.shape[axis]
        place = np.clip((np.arange(length * _FINER) + 0.5) / _FINER - 0.5, 0, length - 1)
        low = place.astype(int)
        share = np.expand_dims(place - low, tuple(range(1, values.ndim - axis)))
        high = np.minimum(low + 1, length - 1)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values
