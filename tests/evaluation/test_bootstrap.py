"""The bootstrap interval."""

import numpy as np
import pytest

from paligemma_jax.evaluation.bootstrap import interval
from paligemma_jax.evaluation.metrics import Scores


def scores(values, weights=None):
    values = np.asarray(values, np.float64)
    return Scores({"mean": float(np.average(values, weights=weights))}, values, weights)


def test_it_is_that_of_the_normal_distribution_for_many_examples():
    values = np.random.default_rng(0).random(2000) < 0.3
    low, high = interval(scores(values))
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_seed_gives_the_same_again():
    values = scores(np.random.default_rng(0).random(50))
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)


def test_weights_are_resampled_with_their_examples():
    low, high = interval(scores([0.0, 1.0] * 50, np.array([0.0, 1.0] * 50)))
    assert low == high == 1


def test_equal_examples_leave_no_doubt_and_what_is_no_mean_has_no_interval():
    assert interval(scores([0.5] * 9)) == (0.5, 0.5)
    assert interval(Scores({"ap": 0.3}, np.zeros(0))) is None


def test_confidence_widens_it():
    values = scores(np.random.default_rng(0).random(50))
    wide, narrow = interval(values, confidence=0.99), interval(values, confidence=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
