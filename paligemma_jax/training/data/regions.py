"""Objects of a picture as data sets give them: a label, a box, perhaps an outline.

All coordinates are shares of the picture's sides, x to the right and y down, 0 to 1: they hold at any resolution.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.config import MASK_SIZE
from paligemma_jax.tasks.detection import Box, Detection, format_objects
from paligemma_jax.tasks.run_lengths import Runs, decode_runs
from paligemma_jax.tasks.segmentation import crop_mask

UNIT = (1, 1)  # the size of a picture whose sides are 1
_FINER = 8  # lines of a polygon's drawing per cell of a mask


@dataclasses.dataclass(frozen=True)
class Grid:
    """A mask, bool [M, M], that spans `box`: what mask codes were decoded to."""

    mask: np.ndarray
    box: Box


Outline = tuple[np.ndarray, ...] | Runs | Grid  # polygons are arrays [n, 2] of x and y


@dataclasses.dataclass(frozen=True)
class Region:
    """One object.

    label: what it is.
    box: (x0, y0, x1, y1).
    outline: polygons whose union it is, or a mask; None when only the box is known.
    codes: the 16 mask codes, where they are known.
    """

    label: str
    box: Box
    outline: Outline | None = None
    codes: tuple[int, ...] | None = None


def to_suffix(regions: Sequence[Region]) -> str:
    """What a model should write for some objects, in their order."""
    return format_objects((Detection(r.label, r.box, codes=r.codes) for r in regions), UNIT)


def in_order(regions: Sequence[Region], classes: Sequence[str]) -> list[Region]:
    """Objects by class, then from top to bottom and from left to right: the same picture has one answer only."""
    number = {name: i for i, name in enumerate(classes)}
    return sorted(regions, key=lambda r: (number.get(r.label, len(number)), r.box[1], r.box[0], r.box))


def cells(outline: Outline, box: Box) -> np.ndarray:
    """The part of an outline in a box: f32 [64, 64], the share of the object in each cell, for the VQ-VAE's encoder."""
    if isinstance(outline, Grid):
        x0, y0, x1, y1 = outline.box
        width, height = max(x1 - x0, 1e-9), max(y1 - y0, 1e-9)
        side = len(outline.mask)
        shares = ((box[0] - x0) / width, (box[1] - y0) / height, (box[2] - x0) / width, (box[3] - y0) / height)
        return crop_mask(outline.mask, tuple(v * side for v in shares))
    if isinstance(outline, Runs):
        corners = (box[0] * outline.width, box[1] * outline.height, box[2] * outline.width, box[3] * outline.height)
        return crop_mask(decode_runs(outline), corners)
    return _drawn(outline, box)


def _drawn(polygons: Sequence[np.ndarray], box: Box) -> np.ndarray:
    side = _FINER * MASK_SIZE
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    corner, extent = np.array(box[:2]), np.maximum(np.subtract(box[2:], box[:2]), 1e-9)
    for polygon in polygons:
        points = (np.asarray(polygon, np.float64) - corner) / extent * side - 0.5  # PIL's pixels have whole centres
        if len(points) > 2:
            pen.polygon([tuple(p) for p in points.tolist()], fill=1)
    fine = np.asarray(image, np.float32).reshape(MASK_SIZE, _FINER, MASK_SIZE, _FINER)
    return fine.mean(axis=(1, 3))


def box_around(polygons: Sequence[np.ndarray]) -> Box:
    """The smallest box that holds some polygons."""
    points = np.concatenate([np.asarray(polygon, np.float64) for polygon in polygons])
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return float(x0), float(y0), float(x1), float(y1)
