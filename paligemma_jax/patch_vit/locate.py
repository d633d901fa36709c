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
    it claims a point where l is above mean l + `threshold` (max l - mean l). Of the phrases that claim a point the most
    probable one, with the highest l, gets it; where none does there is ground. Connected points are one object.

    The score of an object is the cosine similarity of the phrase and the best point, 0 where that is negative, if all
    patch embeddings are as long, else a lower bound; None where the maps do not tell. How high it is for what is in a
    picture depends on the models.

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
    logits = _interpolated(np.asarray(found.logits, np.float64))
    mean, highest = (reduce(found.logits, axis=(1, 2), keepdims=True) for reduce in (np.mean, np.max))
    claimed = logits > mean + threshold * (highest - mean)
    owner = np.where(claimed.any(axis=0), np.where(claimed, logits, -np.inf).argmax(axis=0), -1)
    units = [None] * len(logits) if found.units is None else found.units
    objects = []
    for number, phrase in enumerate(found.phrases[: len(found.phrases) - background]):
        objects += _components(phrase, owner == number, logits[number], units[number], size)
    return objects


def check_threshold(threshold: float) -> None:
    """ConfigError for one that is not between 0 and 1."""
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold={threshold} is not possible: give a number between 0 and 1")


def _components(
    phrase: str, owned: np.ndarray, logits: np.ndarray, unit: float | None, size: tuple[int, int]
) -> list[Detection]:
    """An object for each connected part of the points of a phrase, the one with the highest logit first."""
    parts, count = ndimage.label(owned, _TOUCHING)
    objects = []
    for number in range(1, count + 1):
        part = parts == number
        mask = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.NEAREST))
        if part.sum() >= _LEAST_AREA and mask.any():  # in a picture of a few pixels a part may have none
            best = logits[part].max()
            score = None if unit is None else min(max(float(best / unit), 0.0), 1.0)
            objects.append((best, Detection(phrase, _box(mask), score, mask=mask)))
    return [item for _, item in sorted(objects, key=lambda pair: -pair[0])]


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
