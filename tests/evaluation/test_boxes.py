"""Matching, the area under the curve, and COCO's average precision."""

import math

import numpy as np
import pytest

from paligemma_jax.evaluation.metrics.boxes import auc, match, mean_average_precision
from paligemma_jax.tasks.detection import Detection

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
