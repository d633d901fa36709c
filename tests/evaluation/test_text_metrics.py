"""Metrics of answers in words, by hand."""

import numpy as np
import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.metrics.text import relaxed_match


def test_exact_takes_any_of_the_references_and_no_white_space_at_the_ends():
    found = METRICS["exact"](["a cat ", "A cat", "dog"], ["a cat", ["a dog", "a cat"], ["cat", "Dog"]])
    assert found.values == {"exact": pytest.approx(1 / 3), "exact_lower": 1.0}
    assert found.main == pytest.approx(1 / 3) and found.per_example.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "prediction, target, right",
    [
        ("9.5", "10", True),
        ("9.49", "10", False),
        ("10.5", "10", True),
        ("10.51", "10", False),
        ("-10", "10", False),
        ("50%", "0.5", True),
        ("50", "50%", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("1,000", "1000", False),
        ("", "5", False),
    ],
)
def test_relaxed_accuracy_of_charts(prediction, target, right):
    assert relaxed_match(prediction, target) is right
    assert METRICS["relaxed"].score([prediction], [target])["relaxed_accuracy"] == right


@pytest.mark.parametrize(
    "prediction, right, valid",
    [
        ("The answer is B.", 1, 1),
        ("the answer is b. BECAUSE: it is", 1, 1),
        ("The answer is (B).", 1, 1),
        ("The answer is A.", 0, 1),
        ("B", 0, 0),
        ("I think the answer is B.", 0, 0),
        ("The answer is B", 0, 0),
    ],
)
def test_the_letter_of_science_qa_stands_behind_the_answer_is(prediction, right, valid):
    for reference in ("B", "The answer is B."):
        assert METRICS["science_qa"].score([prediction], [reference]) == {"accuracy": right, "valid": valid}


def test_pope_counts_yes_as_positive():
    said, right = ["Yes", "yes", "no", "no", "a cat"], ["yes", "no", "yes", "no", "no"]
    found = METRICS["pope"](said, right)
    assert found.values == {
        "accuracy": pytest.approx(2 / 5),
        "f1": pytest.approx(2 * 1 / (2 + 2)),
        "precision": pytest.approx(1 / 2),
        "recall": pytest.approx(1 / 2),
        "yes": pytest.approx(2 / 5),
        "valid": pytest.approx(4 / 5),
    }
    assert found.per_example.tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        ([], [], "no examples"),
        (["a"], [[]], "give a text"),
        (["a"], [[3]], "give a text"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions, references, message):
    with pytest.raises(DataError, match=message):
        METRICS["exact"](predictions, references)


@pytest.mark.parametrize("name", ["exact", "vqa", "anls", "anls_big_vision", "relaxed", "science_qa", "pope", "cider"])
def test_the_main_number_is_the_mean_over_examples(name):
    rng = np.random.default_rng(0)
    words = ["yes", "no", "two cats", "The answer is A.", "5", "a red bus"]
    said, right = (rng.choice(words, 20).tolist() for _ in range(2))
    found = METRICS[name](said, right)
    assert len(found.per_example) == 20 and found.main == pytest.approx(found.per_example.mean())
    assert METRICS[name].score(said, right) == found.values and METRICS[name].name == name


@pytest.mark.parametrize("name", ["exact", "vqa", "anls", "relaxed", "pope"])
def test_saying_what_is_right_is_one(name):
    assert METRICS[name](["yes", "no"], ["yes", "no"]).main == 1
