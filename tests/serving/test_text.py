"""Stop strings: never part of the text, whatever pieces it comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.serving.text import StoppingText

_TEXT = st.text("ab;", max_size=20)


def said(pieces, stop) -> tuple[str, bool]:
    text = StoppingText(stop)
    parts = [text.feed(piece) for piece in pieces]
    return "".join(parts) + text.finish(), text.stopped


def expected(text: str, stop) -> tuple[str, bool]:
    """By looking at every beginning of the text."""
    for end in range(len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(st.lists(_TEXT, max_size=6), st.lists(st.text("ab;", min_size=1, max_size=4), max_size=4))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces, stop):
    assert said(pieces, stop) == expected("".join(pieces), stop)


@given(_TEXT, st.lists(st.text("ab;", min_size=1, max_size=4), max_size=4))
def test_what_is_said_is_never_taken_back_and_no_more_is_held_than_need_be(text, stop):
    growing, so_far = StoppingText(stop), ""
    for i, character in enumerate(text):
        so_far += growing.feed(character)
        assert text.startswith(so_far)
        if growing.stopped:
            break
        assert i + 1 - len(so_far) < max([1, *map(len, stop)])


@pytest.mark.parametrize(
    "pieces, stop, text",
    [
        (["red", " circle ; ", "blue"], [" ;"], "red circle"),
        (["re", "d"], ["ed"], "r"),
        (["a ; b"], ["b", " ;"], "a"),
        (["ab"], ["abc", "b"], "a"),
        (["a", "b"], ["abc"], "ab"),  # held back, and then said after all
        (["\n"], ["\n"], ""),
        (["naïve", "é"], ["é"], "naïve"),
    ],
)
def test_by_hand(pieces, stop, text):
    assert said(pieces, stop)[0] == text


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    text = StoppingText(["###"])
    assert [text.feed(piece) for piece in ("a#", "#", "b", "##")] == ["a", "", "##b", ""]
    assert text.finish() == "##"
