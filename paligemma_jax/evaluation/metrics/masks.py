"""Metrics of masks: mean IoU over the true objects, and RefCOCO by big_vision's rules."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation.metrics.boxes import match
from paligemma_jax.evaluation.metrics.metric import Metric, Prediction, Score, Scores, mean_of, ratio_of
from paligemma_jax.tasks.detection import Detection, to_box
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.overlap import box_iou, mask_iou
from paligemma_jax.tasks.reading import NUM_CODES

_REFERRED = re.compile(rf"((?:<loc\d{{4}}>){{4}})((?:<seg\d{{3}}>){{{NUM_CODES}}})")
_NUMBER = re.compile(r"\d+")
_BOX_IOUS = (0.5, 0.75)


def _with_masks(name: str, objects: Prediction) -> Detections:
    if isinstance(objects, str) or any(item.mask is None for item in objects):
        raise DataError(f"{name} needs masks, not their tokens: give Detections, as PaliGemma.objects decodes them")
    return objects


def _measure_iou(prediction: Prediction, reference: Prediction) -> Score:
    found, true = (_with_masks("segmentation_iou", objects) for objects in (prediction, reference))
    overlap = np.zeros((len(found), len(true)))
    for i, item in enumerate(found):
        for j, other in enumerate(true):
            overlap[i, j] = mask_iou(item.mask, other.mask) if item.label == other.label else 0.0
    pairs = match(overlap, np.finfo(np.float64).tiny)
    return {
        "iou": float(sum(overlap[pair] for pair in pairs)),
        "matched": sum(bool(overlap[pair] >= _BOX_IOUS[0]) for pair in pairs),
        "found": len(found),
        "true": len(true),
    }


def _summarize_iou(scores: Sequence[Score]) -> Scores:
    """Mean IoU over all true objects, a missed one counting 0; recall and precision at IoU 0.5."""
    iou, matched, found, true = (sum(score[name] for score in scores) for name in ("iou", "matched", "found", "true"))
    nan = float("nan")
    values = {
        "mask_iou": iou / true if true else nan,
        "recall": matched / true if true else nan,
        "precision": matched / found if found else nan,
    }
    return ratio_of([score["iou"] for score in scores], [score["true"] for score in scores], values)


def read_referred(text: str, size: tuple[int, int], decode: Callable[[np.ndarray], np.ndarray]) -> Detections:
    """The object of an answer to a phrase, as big_vision's transfers/segmentation.py reads it; none if it is not valid.

    The first 20 tokens must be 4 locations, the first corner above and left of the second, and 16 mask codes; the rest
    is ignored. The mask is stretched (bilinear) over the box, whose edges are cut to whole pixels, and holds what is
    above 0.

    Args:
      text: the answer.
      size: (width, height) of the picture in pixels.
      decode: mask codes i32 [1, 16] to a mask f32 [1, 64, 64], positive inside.
    """
    found = _REFERRED.match(text)
    if found is None:
        return Detections(size=size)
    locs, codes = ([int(number) for number in _NUMBER.findall(part)] for part in found.groups())
    if max(locs) > 1023 or max(codes) > 127 or locs[2] <= locs[0] or locs[3] <= locs[1]:
        return Detections(size=size)
    box = to_box(locs, size)
    mask = np.zeros(size[::-1], bool)
    x0, y0, x1, y1 = map(int, box)
    if x1 > x0 and y1 > y0:
        decoded = np.asarray(decode(np.array([codes], np.int32)), np.float32)[0]
        resized = Image.fromarray(decoded).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        mask[y0:y1, x0:x1] = np.asarray(resized) > 0
    return Detections([Detection("", box, codes=tuple(codes), mask=mask)], size)


def _measure_refcoco(prediction: Prediction, reference: Prediction) -> Score:
    found, true = (_with_masks("refcoco", objects) for objects in (prediction, reference))
    if len(true) != 1:
        raise DataError(f"refcoco has {len(true)} objects for a phrase: give one")
    box, mask = (0.0, 0.0) if not found else (box_iou(found[0].box, true[0].box), mask_iou(found[0].mask, true[0].mask))
    accuracies = {f"box_accuracy_{int(100 * least)}": float(box >= least) for least in _BOX_IOUS}
    return {"mask_iou": mask, "box_iou": box, **accuracies, "valid": float(bool(found))}


SEGMENTATION_IOU = Metric("segmentation_iou", _measure_iou, _summarize_iou, objects=True, masks=True)
REFCOCO = Metric("refcoco", _measure_refcoco, mean_of, objects=True, masks=True, read=read_referred)
