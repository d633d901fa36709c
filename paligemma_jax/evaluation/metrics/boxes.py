"""Detection metrics: matching to the ground truth, AUC of the scores, COCO's average precision."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection

ImageDetections = tuple[list[Detection], list[Detection], tuple[int, int]]  # predicted, true, (width, height)


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
