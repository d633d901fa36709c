"""Answers as HTML."""

import re

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.serving.web import history
from paligemma_jax.serving.web.markup import answer_markup, escape, notes_markup, numbers_markup, table_markup
from paligemma_jax.tasks.draw import label_color
from tests.serving.web.conftest import STAR, finished, question

SEGS = "".join(f"<seg{i:03d}>" for i in range(16))


def text_of(markup: str) -> str:
    return re.sub(r"<[^>]*>", "", markup)


def test_labels_have_the_colours_of_their_boxes():
    text = f"{STAR} star ; {STAR} red moon"
    found, _ = pj.parse(text, (10, 10))
    markup = answer_markup(text, found)
    for label in ("star", "red moon"):
        assert f'<mark style="--label:#{bytes(label_color(label)).hex()}">{label}</mark>' in markup
    assert " ".join(text_of(markup).split()) == "0 512 1023 1023 star ; 0 512 1023 1023 red moon"


def test_mask_codes_are_counted():
    text = f"{STAR}{SEGS} star"
    assert text_of(answer_markup(text, pj.parse(text, (9, 9))[0])) == "0 512 1023 1023 + 16 mask codes star"


@pytest.mark.parametrize("text", ["a purple circle", "", "2 < 3 & 4", "<loc00", "<loc0001><lo", "a\nb"])
def test_words_stay_as_they_are(text):
    shown = text_of(answer_markup(text))
    words = re.sub(r"<(loc|seg).*", "", text)
    assert escape(words).strip() in shown


@pytest.mark.parametrize("evil", ["<img src=x onerror=alert(1)>", '"><script>', "{{x}}", "${x}"])
def test_nothing_that_a_model_or_a_visitor_says_is_markup(evil):
    found = [pj.Detection(evil, (0, 0, 1, 1), 0.5, span=(0, len(evil)))]
    entries = history.add((), question().picture, evil, answer_markup(evil))
    whole = [answer_markup(evil), answer_markup(evil, found), table_markup(found), notes_markup([evil])]
    for markup in [*whole, history.history_markup(entries)]:
        assert evil not in markup and not re.search(r"<script|<img src=x|\{\{|\$\{", markup)


def test_the_table_has_a_row_for_each_object():
    mask = np.zeros((20, 40), bool)
    mask[:2, :3] = True
    found = [pj.Detection("star", (1.2, 2, 11.2, 7), 0.876, mask=mask), pj.Detection("", (0, 0, 1, 1))]
    rows = re.findall("<tr>.*?</tr>", table_markup(found))
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert [text_of(cell) for cell in cells[1]] == ["star", "0.88", "1", "2", "10", "5", "6"]
    assert [text_of(cell) for cell in cells[2]] == ["object", "–", "0", "0", "1", "1", "–"]
    assert table_markup([]) == ""


def test_numbers_say_how_fast_it_was():
    shown = text_of(numbers_markup(finished("x", count=11)))
    assert "0.50 s" in shown and "20 tokens/s" in shown and "11 tokens" in shown and "complete" in shown
    assert "1 token" in text_of(numbers_markup(finished("x", "length", count=1)))


def test_history_keeps_the_latest():
    entries = ()
    for i in range(history.MOST + 2):
        entries = history.add(entries, question().picture, f"prompt {i}", "an answer")
    assert len(entries) == history.MOST and entries[0].prompt == f"prompt {history.MOST + 1}"
    assert history.history_markup(entries).count("<li>") == history.MOST
    assert "pj-empty" in history.history_markup(())
