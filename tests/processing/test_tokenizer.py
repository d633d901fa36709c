import dataclasses
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, PromptError, TokenizerError
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, StreamDecoder, Tokenizer

PIECES = [
    "<loc0000>",
    "<loc1023>",
    "<seg127>",
    "<loc1024>",
    "<seg",
    "<bos>",
    "<pad>",
    "\n",
    "  ",
    " cat",
    "red",
    "é",
    "漢",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join)
ADDED = {token: 256000 + i for i, token in enumerate(LOC_TOKENS + SEG_TOKENS)}


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.feed(id_) for id_ in ids] + [decoder.finish()]


@pytest.fixture(scope="session")
def plain_dir(train_tokenizer, tmp_path_factory):
    """Gemma's kind of model: no loc and seg pieces."""
    directory = tmp_path_factory.mktemp("plain")
    (directory / "tokenizer.model").write_bytes(train_tokenizer(user_defined_symbols=["\n"], vocab_size=400))
    return directory


def add_json(plain_dir, directory, name, content):
    directory.joinpath("tokenizer.model").write_bytes(plain_dir.joinpath("tokenizer.model").read_bytes())
    directory.joinpath(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer.from_dir(directory)


@settings(derandomize=True, deadline=None)
@given(text=TEXTS.filter(lambda text: "▁" not in text))  # SentencePiece's own sign for a space
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids), "text never becomes a control token"


@settings(derandomize=True, deadline=None)
@given(text=TEXTS)
def test_encode_equals_sentencepiece_where_it_knows_the_markers(tokenizer, text):
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(tokenizer.to_bytes())
    assert tokenizer.encode(text) == model.encode(text)


@settings(derandomize=True, deadline=None)
@given(ids=st.lists(st.integers(0, 1800)))
def test_stream_equals_decode_for_any_ids(tokenizer, ids):
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text())
@settings(derandomize=True, deadline=None)
def test_stream_gives_whole_characters(tokenizer, text):
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "�" in text or "�" not in "".join(pieces)


def test_character_appears_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("漢")
    assert len(ids) == 3, "byte fallback"
    assert stream(tokenizer, ids) == ["", "", "漢", ""]
    assert stream(tokenizer, ids[:2]) == ["", "", "�"]
    assert tokenizer.decode(ids[:2]) == "�"


def test_every_marker_is_one_id(tokenizer):
    for start, tokens in ((tokenizer.loc_start, LOC_TOKENS), (tokenizer.seg_start, SEG_TOKENS)):
        ids = list(range(start, start + len(tokens)))
        assert [tokenizer.encode(token) for token in tokens] == [[id_] for id_ in ids]
        assert tokenizer.decode(ids) == "".join(tokens)


def test_ids_without_text_are_skipped(tokenizer):
    ids = tokenizer.encode("red circle")
    assert tokenizer.decode([2, *ids, 3, tokenizer.vocab_size, -1, 1, 0, 0]) == "red circle"


def test_newline(tokenizer):
    assert tokenizer.encode("red\n") == [*tokenizer.encode("red"), tokenizer.newline_id]
    assert tokenizer.decode([tokenizer.newline_id]) == "\n"


def test_text_must_be_unicode(tokenizer):
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", ADDED | {"<image>": 257152}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(id_): {"content": t} for t, id_ in ADDED.items()}}),
        ("tokenizer.json", {"added_tokens": [{"id": id_, "content": t} for t, id_ in ADDED.items()]}),
    ],
)
def test_markers_from_added_tokens(plain_dir, tmp_path, name, content):
    tokenizer = add_json(plain_dir, tmp_path, name, content)
    assert (tokenizer.loc_start, tokenizer.seg_start, tokenizer.vocab_size) == (256000, 257024, 257152)
    ids = tokenizer.encode("a<loc0007> red<seg001>")
    assert [id_ for id_ in ids if id_ >= 256000] == [256007, 257025]
    assert tokenizer.decode(ids) == "a<loc0007> red<seg001>"
    tokenizer.check(PaliGemmaConfig())


def test_bare_gemma_model_gets_the_known_layout(plain_dir, monkeypatch):
    pieces = sentencepiece.SentencePieceProcessor(str(plain_dir / "tokenizer.model")).vocab_size()
    monkeypatch.setattr("paligemma_jax.processing.vocabulary._GEMMA_PIECES", pieces)
    tokenizer = Tokenizer.from_dir(plain_dir)
    assert (tokenizer.loc_start, tokenizer.seg_start) == (pieces, pieces + 1024)


def test_tokens_in_disorder(plain_dir, tmp_path):
    swapped = ADDED | {"<loc0005>": ADDED["<loc0006>"], "<loc0006>": ADDED["<loc0005>"]}
    with pytest.raises(TokenizerError, match="<loc0005> is missing or out of order"):
        add_json(plain_dir, tmp_path, "added_tokens.json", swapped)


def test_seg_tokens_missing(plain_dir, tmp_path):
    with pytest.raises(TokenizerError, match="<seg000> is missing"):
        add_json(plain_dir, tmp_path, "added_tokens.json", {token: ADDED[token] for token in LOC_TOKENS})


@pytest.mark.parametrize("content", ['{"<loc0000>": "x"}', '{"<loc0000>": null}'])
def test_odd_added_tokens(plain_dir, tmp_path, content):
    with pytest.raises(TokenizerError, match=r"added_tokens\.json does not list tokens"):
        add_json(plain_dir, tmp_path, "added_tokens.json", content)


def test_damaged_added_tokens(plain_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is not valid JSON"):
        add_json(plain_dir, tmp_path, "added_tokens.json", '{"<loc0000>"')


def test_no_markers_anywhere(plain_dir):
    with pytest.raises(TokenizerError, match=r"no <loc\.{4}> and <seg\.{3}> tokens"):
        Tokenizer.from_dir(plain_dir)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"user_defined_symbols": [*LOC_TOKENS, *SEG_TOKENS], "normalization_rule_name": "nmt_nfkc"},  # becomes a space
        {"user_defined_symbols": [*LOC_TOKENS, *SEG_TOKENS], "byte_fallback": False},
    ],
)
def test_line_break_without_a_token(train_tokenizer, tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(**options))
    with pytest.raises(TokenizerError, match="no token for a line break"):
        Tokenizer.from_dir(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is missing: copy it"):
        Tokenizer.from_dir(tmp_path)


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"<seg099>", b"<seg\xff99>"),
    ],
)
def test_damaged_file(tokenizer_dir, tmp_path, damage):
    (tmp_path / "tokenizer.model").write_bytes(damage((tokenizer_dir / "tokenizer.model").read_bytes()))
    with pytest.raises(TokenizerError, match="not a SentencePiece model, or damaged") as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value)


def test_check(tokenizer):
    config = PaliGemmaConfig(image_token_id=tokenizer.vocab_size)
    tokenizer.check(config)
    with pytest.raises(TokenizerError, match=r"has \d+ ids, the model expects 257152"):
        tokenizer.check(PaliGemmaConfig())
    with pytest.raises(TokenizerError, match="bos id is 2, the model's is 5"):
        tokenizer.check(dataclasses.replace(config, bos_token_id=5))


@pytest.mark.oracle
@settings(derandomize=True, deadline=None, max_examples=50)
@given(text=TEXTS.filter(lambda text: not any(name in text for name in ("<bos>", "<pad>", "▁"))))
def test_ids_equal_transformers(tokenizer_dir, tokenizer, text):
    transformers = pytest.importorskip("transformers")
    reference = transformers.GemmaTokenizer.from_pretrained(tokenizer_dir)
    assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
