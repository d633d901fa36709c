"""How much boxes, masks and pictures have in common."""

from collections.abc import Sequence

import numpy as np

from paligemma_jax.tasks.detection import Box


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1; 0 when both have no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


def box_ious(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """`box_iou` of every box of `a` [N] with every box of `b` [M]: f64 [N, M]."""
    first, second = (np.array(boxes, np.float64).reshape(-1, 4) for boxes in (a, b))
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    either = areas[0][:, None] + areas[1][None, :] - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def clip_box(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box in a picture of `size` (width, height); without area when there is none."""
    x0, x1 = (min(max(float(v), 0.0), float(size[0])) for v in box[::2])
    y0, y1 = (min(max(float(v), 0.0), float(size[1])) for v in box[1::2])
    return x0, y0, x1, y1


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; 0 when both are empty."""
    either = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / either) if either else 0.0
