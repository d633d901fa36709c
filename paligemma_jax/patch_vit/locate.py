"""Boxes and coarse masks of phrases, from their maps over one picture.

Axes: T phrases, R and C rows and columns of a map, H and W in pixels.
"""

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit.activation import PhraseMaps
from paligemma_jax.tasks.detection import Detection

_FINER = 8  # points along a side of a patch that is interpolated
_EDGES = np.ones((3, 3), int)  # points that touch in a corner are connected


@dataclasses.dataclass(frozen=True)
class LocateOptions:
    """What counts as a found object.

    threshold: share, 0..1, of the way from a phrase's mean logit to its highest one, above which a point may be its.
    temperature: of the softmax over phrases and ground, in such shares.
    contrast: how many times the mean activation the highest one is at least; a phrase below it is not in the picture.
    least_area: of an object, in patches.
    """

    threshold: float = 0.5
    temperature: float = 0.1
    contrast: float = 1.5
    least_area: float = 0.25

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold} is not possible: give a number between 0 and 1")
        for name in ("temperature", "contrast"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not possible: give a number above 0")


def locate(
    found: PhraseMaps, size: tuple[int, int], options: LocateOptions = LocateOptions(), background: int = 0
) -> list[Detection]:
    """The objects that phrases name, in the phrases' order, each phrase's best first.

    Phrases compete for each point of the picture, a patch divided by 8. With l the logits of a phrase, interpolated,

        relevance r = (l - mean l) / (max l - mean l)
        probability of p = exp(r_p / temperature) / (exp(threshold / temperature) + sum of exp(r / temperature))

    A point belongs to the most probable phrase if that is more probable than the ground, which has the threshold for
    its relevance. Points that are connected are one object. Its score is the mean probability of its points.

    Args:
      found: maps of phrases; of objects that are not wanted too, so that they keep their points.
      size: (width, height) of the picture in pixels.
      options: what counts.
      background: how many of the last phrases are not wanted.

    Returns:
      Objects with masks, bool [H, W], and the boxes of these in pixels.
    """
    logits = np.asarray(found.logits, np.float64)
    mean, highest = logits.mean(axis=(1, 2), keepdims=True), logits.max(axis=(1, 2), keepdims=True)
    relevance = _interpolated((logits - mean) / np.maximum(highest - mean, np.finfo(np.float32).tiny))
    powers = np.exp((relevance - options.threshold) / options.temperature)
    probabilities = powers / (1 + powers.sum(axis=0))
    owner = np.where(relevance.max(axis=0) > options.threshold, relevance.argmax(axis=0), -1)
    objects = []
    for number, phrase in enumerate(found.phrases[: len(found.phrases) - background]):
        contrast = 1 / np.exp(logits[number] - highest[number]).mean()
        if contrast >= options.contrast:
            objects += _components(phrase, owner == number, probabilities[number], size, options.least_area)
    return objects


def _components(
    phrase: str, owned: np.ndarray, probabilities: np.ndarray, size: tuple[int, int], least_area: float
) -> list[Detection]:
    """An object for each connected part of the points of a phrase."""
    parts, count = ndimage.label(owned, _EDGES)
    objects = []
    for number in range(1, count + 1):
        part = parts == number
        if part.sum() < least_area * _FINER**2:
            continue
        mask = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.NEAREST))
        if mask.any():  # in a picture of a few pixels a part may have none
            objects.append(Detection(phrase, _box(mask), float(probabilities[part].mean()), mask=mask))
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
