"""VQAv2's accuracy: the numbers of visualqa.org's formula, and what its normalization does to a text."""

import pytest

from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.metrics.vqa import normalized, vqa_accuracy


@pytest.mark.parametrize("agreeing, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_people_who_agree(agreeing, accuracy):
    """1 of 10: of the ten sets of nine, nine have it, a third each; 3 of 10: seven sets give 1, three give 2/3."""
    answers = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("red", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("ten an a", "10"),
        ("isnt it", "isn't it"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("what ?", "what"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: all marks go
        ("5.5 p.m.", "5.5 pm"),
        ("3.", "3"),
        ("it's", "it's"),
    ],
)
def test_normalization(text, plain):
    assert normalized(text) == plain


def test_texts_are_normalized_only_where_people_differ():
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert vqa_accuracy("two\n", [" two"] * 10) == 1  # white space always


def test_a_single_answer_is_right_or_wrong():
    assert METRICS["vqa"].score(["red", "blue"], ["red", ["red"]]) == {"vqa_accuracy": 0.5}
