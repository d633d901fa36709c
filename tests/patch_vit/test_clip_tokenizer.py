"""The tokenizer by itself; ids are compared with transformers' in tests/oracle."""

import json

import pytest

from paligemma_jax.errors import TokenizerError
from paligemma_jax.patch_vit.tokenizer import END, START, ClipTokenizer


def write_pair(directory, vocabulary, merges):
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_start_text_end_padding(clip_vocabulary):
    vocabulary, _ = clip_vocabulary
    tokenizer = ClipTokenizer(*clip_vocabulary, context=77)
    [ids] = tokenizer(["a  Red\n circle"])
    words = [vocabulary[f"{word}</w>"] for word in ("a", "red", "circle")]
    assert ids.tolist() == [vocabulary[START], *words, *[vocabulary[END]] * 73]


def test_long_texts_keep_their_end(clip_vocabulary):
    tokenizer = ClipTokenizer(*clip_vocabulary, context=77)
    short, exact, long = tokenizer(["red " * n for n in (74, 75, 76)])
    end = clip_vocabulary[0][END]
    assert short[75] == short[76] == end and exact[75] != end and exact[76] == end
    assert (long == exact).all()


def test_both_kinds_of_files_say_the_same(clip_vocabulary, tmp_path):
    pair, whole = tmp_path / "pair", tmp_path / "whole"
    pair.mkdir(), whole.mkdir()
    write_pair(pair, *clip_vocabulary)
    tokenizer = ClipTokenizer(*clip_vocabulary, context=77)
    tokenizer.save(whole)
    texts = ["a red circle", "It's 12 o'clock, é 漢字 <|endoftext|> x", "", "\u3000 ｆｕｌｌ ‘curly’ &amp;"]
    for directory in (pair, whole):
        assert (ClipTokenizer.from_dir(directory, 77)(texts) == tokenizer(texts)).all()


def test_padding_is_what_the_files_say(clip_vocabulary, tmp_path):
    write_pair(tmp_path, *clip_vocabulary)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert ClipTokenizer.from_dir(tmp_path, 77)(["star"])[0, -1] == clip_vocabulary[0]["!"]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("merges.txt", "#version: 0.2\nr e d\n", "merge 1 is"),
        ("merges.txt", "#version: 0.2\nzz zz\n", "do not fit"),
        ("vocab.json", "[]", "JSON list"),
        ("vocab.json", '{"a": "b"}', "is no vocabulary"),
        ("vocab.json", '{"a": 1}', "lacks '<|startoftext|>'"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "no byte-pair encoding"),
    ],
)
def test_damaged_files_are_refused(clip_vocabulary, tmp_path, name, content, problem):
    write_pair(tmp_path, *clip_vocabulary)
    (tmp_path / name).write_text(content)
    with pytest.raises(Exception, match=problem.replace("|", r"\|")) as error:
        ClipTokenizer.from_dir(tmp_path, 77)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(clip_vocabulary, tmp_path):
    write_pair(tmp_path, *clip_vocabulary)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match=r"lacks merges\.txt"):
        ClipTokenizer.from_dir(tmp_path, 77)
