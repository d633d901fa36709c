"""Matching, the area under the curve, and COCO's average precision."""

import math

import numpy as np
import pytest

from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.metrics.boxes import auc, match, mean_average_precision
from paligemma_jax.tasks.detection import Detection, parse
from paligemma_jax.tasks.detections import Detections

SIZE = (100, 80)
TRUE = [Detection("cat", (10.0, 10.0, 40.0, 40.0)), Detection("dog", (50.0, 20.0, 90.0, 70.0))]


def test_match_is_best_first_and_uses_each_once():
    overlap = np.array([[0.9, 0.8], [0.95, 0.0], [0.7, 0.6]])
    assert match(overlap) == [(1, 0), (0, 1)]
    assert match(overlap, threshold=0.99) == []
    assert match(np.zeros((0, 3))) == []


def test_auc_is_the_chance_to_be_in_order():
    assert auc([3, 4], [1, 2]) == 1 and auc([1, 2], [3, 4]) == 0 and auc([1, 1], [1]) == 0.5
    assert auc([1, 3], [2]) == 0.5 and auc([0.9, 0.8, 0.1], [0.5, 0.85]) == pytest.approx(3 / 6)
    assert math.isnan(auc([], [1])) and math.isnan(auc([1], []))


def scored(score, items=TRUE):
    return [Detection(item.label, item.box, score) for item in items]


def test_average_precision_of_who_knows_and_who_does_not():
    assert mean_average_precision([(scored(0.5), TRUE, SIZE)] * 3)["map"] == pytest.approx(1)
    assert mean_average_precision([([], TRUE, SIZE)])["map"] == 0
    assert mean_average_precision([(scored(0.5, [Detection("cow", TRUE[0].box)]), TRUE, SIZE)])["map"] == 0
    assert math.isnan(mean_average_precision([([], [], SIZE)])["map"])


def test_average_precision_depends_on_scores_and_on_boxes():
    wrong = [Detection("cat", (60.0, 60.0, 70.0, 70.0), 0.5), Detection("dog", (1.0, 1.0, 9.0, 9.0), 0.5)]
    above, below = (mean_average_precision([(scored(s) + wrong, TRUE, SIZE)]) for s in (0.9, 0.1))
    assert above["map"] == pytest.approx(1) and below["map"] == pytest.approx(0.5, abs=0.02)
    shifted = [Detection(item.label, tuple(v + 5 for v in item.box), 0.9) for item in TRUE]
    measured = mean_average_precision([(shifted, TRUE, SIZE)])
    assert measured["map_50"] == pytest.approx(1) and 0 < measured["map"] < measured["map_75"] + 0.5 < 1.5


def text(*objects):
    parts = (("".join(f"<loc{v:04d}>" for v in (y0, x0, y1, x1)), label) for label, x0, y0, x1, y1 in objects)
    return " ; ".join(f"{locations} {label}" for locations, label in parts)


CAT, DOG = ("cat", 0, 0, 100, 100), ("dog", 200, 200, 300, 300)
HALF = ("cat", 0, 0, 100, 60)  # IoU 0.6 with CAT


def test_f1_counts_boxes_over_all_pictures():
    found = METRICS["detection_f1"]([text(HALF, HALF), "", text(DOG)], [text(CAT, DOG), "", text(DOG)])
    assert found.values == {
        "f1": pytest.approx(2 * 2 / (3 + 3)),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "mean_iou": pytest.approx((0.6 + 1) / 2),
        "duplicates": pytest.approx(1 / 3),
    }
    assert found.per_example.tolist() == [0.5, 0, 1] and found.weights.tolist() == [4, 0, 2]
    assert np.average(found.per_example, weights=found.weights) == pytest.approx(found.main)


def test_f1_needs_the_label_and_half_of_the_box():
    less = ("cat", 0, 0, 100, 49)
    assert METRICS["detection_f1"]([text(less)], [text(CAT)]).main == 0
    assert METRICS["detection_f1"]([text(("dog", *CAT[1:]))], [text(CAT)]).main == 0
    assert math.isnan(METRICS["detection_f1"]([""], [""]).main)


def test_iou_does_not_depend_on_the_size_of_the_picture():
    size = (640, 48)
    said, right = text(HALF, DOG), text(CAT, DOG)
    as_boxes = [Detections(parse(part, size)[0], size) for part in (said, right)]
    scores = [METRICS["detection_f1"].score([a], [b]) for a, b in ((said, right), as_boxes)]
    assert scores[0] == pytest.approx(scores[1])


def test_ap_by_score_and_at_score_1():
    """The wrong box comes first in the text; its score is lower."""
    wrong, right = Detection("cat", (60.0, 60.0, 70.0, 70.0), 0.1), Detection("cat", TRUE[0].box, 0.9)
    found = METRICS["detection_ap"]([Detections([wrong, right], SIZE)], [Detections(TRUE[:1], SIZE)])
    assert found.values["ap"] == pytest.approx(1) and found.values["ap_50_score_1"] == pytest.approx(0.5, abs=0.01)
    assert not len(found.per_example)  # it is no mean over pictures
