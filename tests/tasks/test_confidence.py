"""Scores, probabilities of sides and expected boxes from tokens and their scores."""

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.tasks.confidence import score, words_logprob
from paligemma_jax.tasks.detection import parse

TIMING = pj.Timing(0.0, 1.0, 1.0, 1)
SIZE = (1023, 2046)  # one location is one pixel across, two down
CAT = "<loc0100><loc0200><loc0300><loc0400> cat"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))


def scored(tokenizer, text, sure=None, near=1.0, expected=0.0):
    """Objects of a text whose tokens have probability 1, near 1 and mean 0, but for those in `sure` {text: p}.

    <eos>, whose text is "", has one half: it is no part of an object.
    """
    tokens = np.array([*tokenizer.encode(text), 1])
    sure = {"": 0.5} | (sure or {})
    logprobs, values = np.zeros(len(tokens)), np.full((2, len(tokens)), [[near], [expected]], float)
    for i, token in enumerate(tokens):
        logprobs[i] = np.log(sure.get(tokenizer.decode([token]), 1.0))
        if np.ndim(expected) == 0 and tokenizer.loc_start <= token < tokenizer.loc_start + 1024:
            values[1, i] = token - tokenizer.loc_start + expected
    output = pj.Output(text, tokens, logprobs, "eos", TIMING, *values)
    return score(parse(text, SIZE)[0], output, tokenizer, SIZE)


def test_the_formula(tokenizer):
    (item,) = scored(tokenizer, CAT, {"<loc0100>": 0.1, "<loc0200>": 0.2, "<loc0300>": 0.3, "<loc0400>": 0.4}, near=0.5)
    assert item.score == pytest.approx(0.5)  # of the exact locations nothing goes in
    np.testing.assert_allclose(item.side_probabilities, (0.2, 0.1, 0.4, 0.3), rtol=1e-6)
    label = dict.fromkeys(map(tokenizer.decode, ([i] for i in tokenizer.encode(" cat"))), 0.5)
    (item,) = scored(tokenizer, CAT, label)
    assert item.score == pytest.approx(0.5 ** len(tokenizer.encode(" cat")))


def test_the_expected_box_is_in_pixels_and_in_order(tokenizer):
    (item,) = scored(tokenizer, CAT, expected=10.0)
    np.testing.assert_allclose(item.expected_box, (210, 220, 410, 620))
    probabilities = {"<loc0300>": 0.3, "<loc0400>": 0.4, "<loc0100>": 0.1, "<loc0200>": 0.2}
    (turned,) = scored(tokenizer, "<loc0300><loc0400><loc0100><loc0200> cat", probabilities)
    assert turned.expected_box == turned.box
    np.testing.assert_allclose(turned.side_probabilities, (0.2, 0.1, 0.4, 0.3), rtol=1e-6)


def test_objects_do_not_take_from_each_other(tokenizer):
    text = f"{CAT} ; <loc0001><loc0002><loc0003><loc0004>{CODES} dog ; {CAT}"
    first, second, third = scored(
        tokenizer, text, {" dog": 0.5, "<loc0003>": 0.25, "<seg003>": 0.1, " ;": 0.1, " ": 0.1}
    )
    assert first.score == third.score == pytest.approx(1.0)
    assert second.side_probabilities == pytest.approx((1, 1, 1, 0.25)) and second.score <= 1


@pytest.mark.parametrize("text", [CAT.removesuffix(" cat"), CAT.removesuffix(" cat") + CODES])
def test_without_a_label_the_box_alone_makes_the_score(tokenizer, text):
    (item,) = scored(tokenizer, text, {"<seg003>": 0.1}, near=0.5)
    assert item.label == "" and item.score == pytest.approx(0.5)
    first, second = scored(tokenizer, text + text, {"<loc0100>": 0.1}, near=0.25)
    assert first.score == second.score == pytest.approx(0.25) and first.side_probabilities[1] == pytest.approx(0.1)


def test_a_label_in_front_of_its_box_counts(tokenizer):
    """Each has its own tokens, and not those of the other."""
    box = CAT.removesuffix(" cat")
    no, two = scored(tokenizer, f"no {box} two {box}", {"no": 0.5, "two": 0.125, " two": 0.125})
    assert (no.label, two.label) == ("no", "two")
    assert no.score == pytest.approx(0.5 ** len([t for t in tokenizer.encode("no ") if tokenizer.decode([t]) == "no"]))
    assert two.score < 1 and two.side_probabilities == no.side_probabilities


def test_what_joins_objects_is_no_part_of_their_scores(tokenizer):
    for joint in (",", ", ", " ; ", "\n", ""):
        first, second = scored(tokenizer, f"{CAT}{joint}{CAT}", dict.fromkeys((",", ";", " ;", "\n"), 0.1))
        assert first.score == second.score == pytest.approx(1.0)


def test_words_are_what_is_neither_location_nor_code(tokenizer):
    for text, expected in (("a cat", -0.5), (CAT + CODES, -0.5), (CODES, -0.5), ("", -0.5)):
        tokens = np.array([*tokenizer.encode(text), 1])
        is_word = np.array([not tokenizer.decode([i]).startswith(("<loc", "<seg")) for i in tokens])
        output = pj.Output(text, tokens, np.where(is_word, -0.5, -9.0), "eos", TIMING, *np.zeros((2, len(tokens))))
        assert words_logprob(output, tokenizer) == pytest.approx(expected)
    coded = np.array(tokenizer.encode(CODES))
    assert words_logprob(pj.Output(CODES, coded, coded * 0.0, "length", TIMING, coded, coded), tokenizer) is None


def test_locations_spelled_in_letters_have_no_score(tokenizer):
    tokens = np.array([i for letter in CAT for i in tokenizer.encode(letter)])
    output = pj.Output(
        CAT, tokens, np.zeros(len(tokens)), "eos", pj.Timing(0.0, 1.0, 1.0, 1), *np.zeros((2, len(tokens)))
    )
    (item,) = score(parse(CAT, SIZE)[0], output, tokenizer, SIZE)
    assert item.score is None and item.side_probabilities is None
