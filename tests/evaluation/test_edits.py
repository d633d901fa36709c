"""ANLS in its two customs, and error rates of reading."""

import pytest

from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.metrics.edits import edit_distance

CASES = [  # prediction, answers, anls, anls_big_vision
    ("hello", ["hello"], 1, 1),
    ("hallo", ["hello"], 0.8, 0.8),
    ("Hello", ["hello"], 1, 1),
    ("abcd", ["abxy"], 0.5, 0),  # a distance of exactly one half
    ("abcd", ["axyz"], 0, 0),
    ("abcd", ["axyz", "abcx"], 0.75, 0.75),
    ("a  b", ["a b"], 1, 0.75),
    ("", ["x"], 0, 0),
    ("", [""], 1, 1),
    ("x", [""], 0, 0),
]


@pytest.mark.parametrize("prediction, answers, common, big_vision", CASES)
def test_anls(prediction, answers, common, big_vision):
    assert METRICS["anls"].score([prediction], [answers])["anls"] == pytest.approx(common)
    assert METRICS["anls_big_vision"].score([prediction], [answers])["anls_big_vision"] == pytest.approx(big_vision)


@pytest.mark.parametrize(
    "a, b, distance",
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_reading_by_hand():
    """Of 11 + 3 characters 1 + 3 are edited, of 2 + 1 words 1 + 1; 1 word is shared by 2 + 0 said and 3 true ones."""
    found = METRICS["reading"](["main  streat", ""], ["main street", "abc"])
    assert found.values == {
        "exact": 0.0,
        "cer": pytest.approx((1 + 3) / (11 + 3)),
        "wer": pytest.approx((1 + 1) / (2 + 1)),
        "token_f1": pytest.approx(2 * 1 / (3 + 2)),
    }


def test_what_is_read_right():
    found = METRICS["reading"](["a b", " c "], ["a b", "c"])
    assert found.values == {"exact": 1, "cer": 0, "wer": 0, "token_f1": 1} and found.per_example.tolist() == [1, 1]
