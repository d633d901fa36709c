"""Words and phrases as spans of tokens."""

import pytest

from paligemma_jax.errors import PromptError
from paligemma_jax.inspection.words import find, pieces, words

TEXTS = [
    "detect red circle ; blue square",
    "<loc0001><loc0020><seg001><seg002> red circle ; <loc0003> é and 猫",
    "",
    " ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    texts = pieces(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_word_hold_it(tokenizer, text):
    ids = tokenizer.encode(text)
    found = words(tokenizer, ids)
    assert "".join(word.text for word in found) == text.replace(" ", "")
    for word in found:
        assert word.text in tokenizer.decode(ids[word.start : word.stop])
        assert word.text not in tokenizer.decode(ids[word.start + 1 : word.stop])
        assert word.text not in tokenizer.decode(ids[word.start : word.stop - 1])


def test_each_location_is_a_word_and_the_codes_of_a_mask_are_one(tokenizer):
    ids = tokenizer.encode("<loc0001><loc0020><seg001><seg002>cat")
    assert [word.text for word in words(tokenizer, ids)] == ["<loc0001>", "<loc0020>", "<seg001><seg002>", "cat"]


def test_whole_words_are_found_before_parts_of_others(tokenizer):
    ids = tokenizer.encode("redder red blue red")
    word = find(tokenizer, ids, "red")
    before, inside = tokenizer.decode(ids[: word.start]), tokenizer.decode(ids[word.start : word.stop])
    assert before.strip() == "redder" and inside.strip() == "red"
    part = find(tokenizer, tokenizer.encode("redder"), "red")
    assert (part.text, part.start) == ("red", 0)


@pytest.mark.parametrize("text", ["green", "", "blue red"])
def test_what_is_not_there_is_named(tokenizer, text):
    with pytest.raises(PromptError, match=f"'{text}' is not part of 'red blue'"):
        find(tokenizer, tokenizer.encode("red blue"), text)
