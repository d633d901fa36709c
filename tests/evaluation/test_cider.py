"""CIDEr-D against pycocoevalcap: tests/golden/captions.json, made by make_captions.py beside it."""

import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.evaluation import METRICS
from paligemma_jax.evaluation.metrics.caption_tokens import words
from paligemma_jax.evaluation.metrics.cider import cider

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text(encoding="utf-8"))
CIDER = METRICS["cider"]


def columns(name):
    return [image[name] for image in GOLDEN["images"]]


def test_words_are_those_of_the_java_tokenizer():
    assert {text: " ".join(words(text)) for text, _ in GOLDEN["words"]} == dict(GOLDEN["words"])


def test_scores_are_those_of_the_reference_implementation():
    found = CIDER(columns("prediction"), columns("references"))
    np.testing.assert_allclose(found.per_example, GOLDEN["per_image"], rtol=1e-12, atol=1e-15)
    assert found.main == pytest.approx(GOLDEN["cider"], rel=1e-12)


def test_saying_the_only_reference_is_ten_if_its_words_are_rare():
    found = CIDER(["a b c d", "e f g h"], ["a b c d", "e f g h"])
    np.testing.assert_allclose(found.per_example, 10)


def test_two_words_by_hand():
    """Both words are rare (log 2 each): the cosine of unigrams is 1/2; longer n-grams have nothing in common."""
    [score, _] = cider([["x", "q"], ["z"]], [[["x", "y"]], [["z"]]])
    assert score == pytest.approx(10 * (1 / 2) / 4)


def test_one_image_has_no_rare_words():
    assert CIDER(["a cat"], [["a cat"]]).main == 0


def test_order_of_references_and_images_makes_no_difference():
    said, right = columns("prediction"), columns("references")
    found = CIDER(said[::-1], [texts[::-1] for texts in right[::-1]])
    np.testing.assert_allclose(found.per_example[::-1], GOLDEN["per_image"], rtol=1e-12, atol=1e-15)
