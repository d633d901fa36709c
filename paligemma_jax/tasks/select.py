"""Which of the found objects to keep: by score, without duplicates, without boxes that cover each other.

Every function returns some of the objects it was given, in their order, and changes none. An object whose score is not
known counts as one of score 0: it goes when any minimum is asked for, and gives way to an equal one with a score.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from paligemma_jax.errors import PromptError
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.overlap import box_ious

_SAME_BOX = 0.95  # IoU of boxes that differ by about a location unit in a corner


def known_score(item: Detection) -> float:
    """The score of an object, 0 when it is not known or no number."""
    return 0.0 if item.score is None or item.score != item.score else item.score


@dataclasses.dataclass(frozen=True)
class Selection:
    """The objects of an answer that are kept, and how many were left out for which reason."""

    kept: list[Detection]
    below_score: int
    duplicates: int
    suppressed: int


def check_thresholds(min_score: float, nms: float) -> None:
    """PromptError unless both are numbers from 0 to 1."""
    if not (0 <= min_score <= 1 and 0 <= nms <= 1):
        raise PromptError(f"min_score={min_score} with nms={nms} is not possible: give numbers from 0 to 1")


def select(found: Sequence[Detection], min_score: float = 0.0, nms: float = 0.0) -> Selection:
    """Leave out objects below a score, those said twice, and with `nms` above 0 those that a better one covers.

    Args:
      found: objects of one image.
      min_score: 0..1.
      nms: IoU, 0..1, above which of two boxes of a label the lower scored is left out; 0 keeps both.
    """
    good = above(found, min_score)
    single = without_duplicates(good)
    kept = suppress(single, nms) if nms else single
    return Selection(kept, len(found) - len(good), len(good) - len(single), len(single) - len(kept))


def above(detections: Sequence[Detection], min_score: float) -> list[Detection]:
    """The objects with a score of at least `min_score`."""
    return [item for item in detections if known_score(item) >= min_score]


def without_duplicates(detections: Sequence[Detection]) -> list[Detection]:
    """One of each group of objects with the same label and, but for a location unit or so, the same box: the best.

    Boxes without area are the same when they are equal.
    """
    boxes = [item.box for item in detections]
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    equal = (corners[:, None] == corners[None, :]).all(-1)
    return _greedy(detections, (equal | (box_ious(boxes, boxes) >= _SAME_BOX)) & _same_label(detections))


def suppress(detections: Sequence[Detection], iou: float, per_label: bool = True) -> list[Detection]:
    """Greedy non-maximum suppression: best first, each object that overlaps none kept before by more than `iou`.

    Args:
      detections: objects of one picture. Of equal scores the earlier one wins.
      iou: intersection over union of boxes, 0..1, up to which both are kept.
      per_label: only an object with the same label can push one out.
    """
    boxes = [item.box for item in detections]
    rivals = box_ious(boxes, boxes) > iou
    return _greedy(detections, rivals & _same_label(detections) if per_label else rivals)


def _same_label(detections: Sequence[Detection]) -> np.ndarray:
    """[N, N] bool."""
    labels = [item.label for item in detections]
    numbers = np.array([labels.index(label) for label in labels], int)
    return numbers[:, None] == numbers[None, :]


def _greedy(detections: Sequence[Detection], rivals: np.ndarray) -> list[Detection]:
    """The objects left when each, best first, pushes out its `rivals` [N, N] of lower rank."""
    order = sorted(range(len(detections)), key=lambda i: -known_score(detections[i]))  # stable: ties keep their order
    kept: list[int] = []
    for i in order:
        if not rivals[i, kept].any():
            kept.append(i)
    return [detections[i] for i in sorted(kept)]
