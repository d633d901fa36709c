"""Metrics of boxes: matching to the ground truth, F1, AUC of the scores, COCO's average precision.

Predictions and references are `Detections`, or texts that `tasks.detection` parses: IoU does not depend on the size of
the picture, so texts need none.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence

import numpy as np

from paligemma_jax.evaluation.metrics.metric import Metric, Prediction, Score, Scores, ratio_of
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection, parse
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.overlap import box_ious

ImageDetections = tuple[list[Detection], list[Detection], tuple[int, int]]  # predicted, true, (width, height)

_IOU = 0.5  # from which a box is found
_SAME = 0.9  # IoU from which two boxes of a label are one that is said twice
TEXT_SIZE = (1023, 1023)  # of a picture whose size is not known: a location is a pixel


def as_detections(objects: Prediction) -> Detections:
    """Objects as they are, or those of a text, in a square picture of 1023 pixels."""
    return Detections(parse(objects, TEXT_SIZE)[0], TEXT_SIZE) if isinstance(objects, str) else objects


def match(overlap: np.ndarray, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Greedy matching of predicted and true objects by overlap [P, T], best first: pairs (predicted, true).

    A pair overlaps by at least `threshold`; each object is used once.
    """
    pairs = []
    rest = overlap.copy()
    while rest.size and rest.max() >= threshold:
        found, true = np.unravel_index(rest.argmax(), rest.shape)
        pairs.append((int(found), int(true)))
        rest[found, :] = rest[:, true] = -1.0
    return pairs


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Area under the ROC curve of scores, a tie counting half; NaN without positives or without negatives."""
    if not len(positives) or not len(negatives):
        return float("nan")
    difference = np.subtract.outer(np.asarray(positives, float), np.asarray(negatives, float))
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def mean_average_precision(pictures: Sequence[ImageDetections]) -> dict[str, float]:
    """COCO's box metrics over all labels: `map` (mean over IoU 0.50:0.95), `map_50` and `map_75`; NaN without truth.

    Raises:
      ConfigError: pycocotools is not installed.
    """
    coco.require()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    classes = sorted({item.label for found, true, _ in pictures for item in (*found, *true)})
    images = [coco.image(i, f"{i}.png", size) for i, (_, _, size) in enumerate(pictures, 1)]
    truth, results = [], []
    for i, (found, true, size) in enumerate(pictures, 1):
        truth += coco.annotate(true, i, size, classes)
        results += coco.annotate(found, i, size, classes)
    if not truth:
        return dict.fromkeys(("map", "map_50", "map_75"), float("nan"))
    if not results:
        return dict.fromkeys(("map", "map_50", "map_75"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        reference = COCO()
        reference.dataset = {"info": {}} | coco.to_dataset(images, truth, classes)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(coco.to_results(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = zip(("map", "map_50", "map_75"), evaluation.stats, strict=False)
    return {name: float(value) if value >= 0 else float("nan") for name, value in found}  # -1: no truth with an area


def overlaps(found: Sequence[Detection], true: Sequence[Detection]) -> np.ndarray:
    """IoU of each predicted with each true box f64 [P, T], 0 where labels differ."""
    same = np.array([[a.label == b.label for b in true] for a in found], bool).reshape(len(found), len(true))
    return np.where(same, box_ious([a.box for a in found], [b.box for b in true]), 0.0)


def _duplicates(found: Sequence[Detection]) -> int:
    """Boxes that repeat an earlier one of their label."""
    again = np.tril(overlaps(found, found), -1) >= _SAME
    return int(again.any(1).sum()) if len(found) else 0


def _measure_f1(prediction: Prediction, reference: Prediction) -> Score:
    found, true = as_detections(prediction), as_detections(reference)
    iou = overlaps(found, true)
    pairs = match(iou, _IOU)
    return {
        "matched": len(pairs),
        "found": len(found),
        "true": len(true),
        "duplicates": _duplicates(found),
        "iou": float(sum(iou[pair] for pair in pairs)),
    }


def _summarize_f1(scores: Sequence[Score]) -> Scores:
    """F1 over all boxes of all pictures: 2 matched / (found + true); NaN where there are none at all."""
    matched, found, true, iou, twice = (
        float(sum(score[name] for score in scores)) for name in ("matched", "found", "true", "iou", "duplicates")
    )
    nan = float("nan")
    values = {
        "f1": 2 * matched / (found + true) if found + true else nan,
        "precision": matched / found if found else nan,
        "recall": matched / true if true else nan,
        "mean_iou": iou / matched if matched else nan,
        "duplicates": twice / found if found else 0.0,
    }
    return ratio_of([2 * s["matched"] for s in scores], [s["found"] + s["true"] for s in scores], values)


def _measure_ap(prediction: Prediction, reference: Prediction) -> Score:
    found, true = as_detections(prediction), as_detections(reference)
    return {
        "boxes": [[item.label, [round(v, 2) for v in item.box], item.score] for item in found],
        "true_boxes": [[item.label, [round(v, 2) for v in item.box]] for item in true],
        "size": list(true.size),
    }


def _summarize_ap(scores: Sequence[Score]) -> Scores:
    """COCO's AP twice: boxes in the order of their scores, and as if all scores were 1, which is what a text says."""

    def pictures(with_scores: bool) -> Iterable[ImageDetections]:
        for score in scores:
            found = [
                Detection(label, tuple(box), value if with_scores else 1.0) for label, box, value in score["boxes"]
            ]
            true = [Detection(label, tuple(box)) for label, box in score["true_boxes"]]
            yield found, true, tuple(score["size"])

    scored, plain = (mean_average_precision(list(pictures(with_scores))) for with_scores in (True, False))
    values = {name.replace("map", "ap"): value for name, value in scored.items()}
    return Scores(values | {f"{name.replace('map', 'ap')}_score_1": v for name, v in plain.items()}, np.zeros(0))


DETECTION_F1 = Metric("detection_f1", _measure_f1, _summarize_f1, objects=True)
DETECTION_AP = Metric("detection_ap", _measure_ap, _summarize_ap, objects=True, needs_pycocotools=True)
