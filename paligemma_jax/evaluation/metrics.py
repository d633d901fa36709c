"""What was found against what is there: which is which, and how well scores tell right from wrong."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection

Found = tuple[list[Detection], list[Detection], tuple[int, int]]  # found, true, (width, height) in pixels


def match(overlap: np.ndarray, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Pair found things with true ones, best first: (found, true) for each entry of [F, T] of at least `threshold`.

    Each thing is used once.
    """
    pairs = []
    rest = overlap.copy()
    while rest.size and rest.max() >= threshold:
        found, true = np.unravel_index(rest.argmax(), rest.shape)
        pairs.append((int(found), int(true)))
        rest[found, :] = rest[:, true] = -1.0
    return pairs


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The chance that a right one scores higher than a wrong one, a tie counting half; NaN when one kind is missing."""
    if not len(right) or not len(wrong):
        return float("nan")
    difference = np.subtract.outer(np.asarray(right, float), np.asarray(wrong, float))
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def mean_average_precision(pictures: Sequence[Found]) -> dict[str, float]:
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
    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        reference = COCO()
        reference.dataset = {"info": {}} | coco.to_dataset(images, truth, classes)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(coco.to_results(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = zip(("map", "map_50", "map_75"), evaluation.stats, strict=False)
    return {name: float(value) if value >= 0 else float("nan") for name, value in found}  # -1: no truth with an area
