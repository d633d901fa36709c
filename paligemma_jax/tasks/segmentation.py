"""Masks between the picture and the 64x64 square of the mask VQ-VAE that stands for the object's box.

Both directions resample with a triangle filter (bilinear, widened when shrinking), as PIL does, but from exact box
edges instead of whole pixels. A pixel belongs to a box when its centre does.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import MASK_SIZE
from paligemma_jax.tasks.detection import Box, Detection


def attach_masks(
    found: Sequence[Detection], size: tuple[int, int], decode: Callable[[np.ndarray], np.ndarray]
) -> list[Detection]:
    """The same objects, those with codes also with their masks.

    Args:
      found: objects of one picture.
      size: (width, height) of the picture in pixels.
      decode: codes [N, 16] i32 to masks [N, 64, 64], positive inside; called once, with N padded to a power of two so
        that a jitted function meets few shapes.
    """
    coded = [i for i, item in enumerate(found) if item.codes is not None]
    result = list(found)
    if coded:
        codes = np.array([found[i].codes for i in coded], np.int32)
        bucket = power_of_two(len(coded))
        decoded = np.asarray(decode(np.pad(codes, [(0, bucket - len(coded)), (0, 0)])))
        for i, mask in zip(coded, decoded, strict=False):  # the padding's masks are left over
            result[i] = dataclasses.replace(found[i], mask=paste_mask(mask, found[i].box, size))
    return result


def paste_mask(decoded: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Stretches a decoded mask over its box and cuts it at 0.

    Args:
      decoded: [M, M] float, positive inside the object, usually 64x64.
      box: (x0, y0, x1, y1) in pixels; it may reach outside the picture, and one that holds no pixel centre is empty.
      size: (width, height) of the picture in pixels.

    Returns:
      [H, W] bool, False outside the box.
    """
    width, height = size
    x0, y0, x1, y1 = box
    columns, rows = _pixels_inside(x0, x1, width), _pixels_inside(y0, y1, height)
    mask = np.zeros((height, width), bool)
    if len(columns) and len(rows):
        num_rows, num_columns = decoded.shape
        across = _triangle_weights((columns + 0.5 - x0) * num_columns / (x1 - x0), num_columns / (x1 - x0), num_columns)
        down = _triangle_weights((rows + 0.5 - y0) * num_rows / (y1 - y0), num_rows / (y1 - y0), num_rows)
        inside = down @ np.asarray(decoded, np.float32) @ across.T > 0
        mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inside
    return mask


def crop_mask(mask: np.ndarray, box: Box, mask_size: int = MASK_SIZE) -> np.ndarray:
    """The inverse of `paste_mask`: what the mask VQ-VAE's encoder is given for an object.

    Args:
      mask: [H, W] bool.
      box: (x0, y0, x1, y1) in pixels; parts outside the picture, and boxes without area, give zeros.
      mask_size: side of the result in pixels.

    Returns:
      [mask_size, mask_size] f32 in 0..1, the share of the object in each cell.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = box
    if not (x1 > x0 and y1 > y0):
        return np.zeros((mask_size, mask_size), np.float32)
    cells = (np.arange(mask_size) + 0.5) / mask_size
    across = _triangle_weights(x0 + cells * (x1 - x0), (x1 - x0) / mask_size, width)
    down = _triangle_weights(y0 + cells * (y1 - y0), (y1 - y0) / mask_size, height)
    return np.clip(down @ mask.astype(np.float32) @ across.T, 0, 1)


def _pixels_inside(start: float, stop: float, length: int) -> np.ndarray:
    """Indices of the pixels of a line of `length` whose centres lie in [start, stop)."""
    first, last = np.clip(np.ceil([start - 0.5, stop - 0.5]), 0, length).astype(int)
    return np.arange(first, last)


def _triangle_weights(centres: np.ndarray, scale: float, length: int) -> np.ndarray:
    """[len(centres), length] weights that sample a line of `length` pixels at `centres` (edges at 0 and length).

    `scale` is source pixels per sample; the filter widens with it above 1. Samples too far outside the line are 0.
    """
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32)
