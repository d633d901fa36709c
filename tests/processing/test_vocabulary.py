"""tokenizer.json and tokens that JSON files add: read as one id, never as a control token, refused in one line."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import CheckpointError, PromptError, TokenizerError
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import StreamDecoder, Tokenizer

PIECES = ["<loc0000>", "<seg127>", "<loc1024>", "<bos>", "<image>", "\n", "\n\n", "  ", " cat", "\t", "é", "漢", "\0"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join).filter(lambda text: "▁" not in text)
MENU = ("<s_menu>", "</s_menu>", "sep token")


@pytest.fixture(scope="module")
def json_dir(write_tokenizer_json, tmp_path_factory):
    directory = tmp_path_factory.mktemp("json")
    write_tokenizer_json(directory)
    return directory


@pytest.fixture(scope="module")
def from_json(json_dir) -> Tokenizer:
    return Tokenizer.from_dir(json_dir)


@pytest.fixture
def menu(write_tokenizer_json, tokenizer_dir, tokenizer, tmp_path):
    """menu(kind): a tokenizer with tokens behind <image>, whose files are of a kind."""

    def make(kind: str) -> Tokenizer:
        image = tokenizer.vocab_size
        added = {"<image>": image} | {token: image + 1 + i for i, token in enumerate(MENU)}
        if kind in ("tokenizer.json", "both"):
            write_tokenizer_json(tmp_path, MENU)
        if kind != "tokenizer.json":
            (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
        if kind == "added_tokens.json":
            (tmp_path / kind).write_text(json.dumps(added))
        if kind == "tokenizer_config.json":
            decoder = {id_: {"content": token, "special": True} for token, id_ in added.items()}
            (tmp_path / kind).write_text(json.dumps({"added_tokens_decoder": decoder}))
        return Tokenizer.from_dir(tmp_path)

    return make


@settings(derandomize=True, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_the_sentencepiece_model(tokenizer, from_json, text):
    ids = from_json.encode(text)
    assert ids == tokenizer.encode(text)
    assert from_json.decode(ids) == text
    assert not {0, 1, 2, 3, from_json.vocab_size} & set(ids), "text never becomes a control token"


def test_attributes_and_bytes_are_those_of_the_sentencepiece_model(tokenizer, from_json):
    for name in ("vocab_size", "bos_id", "eos_id", "loc_start", "seg_start", "newline_id"):
        assert getattr(from_json, name) == getattr(tokenizer, name), name
    ids = [*range(-1, tokenizer.vocab_size + 3), 10**6]
    assert [from_json.token_bytes(id_) for id_ in ids] == [tokenizer.token_bytes(id_) for id_ in ids]
    decoder = StreamDecoder(from_json)
    assert [decoder.feed(id_) for id_ in tokenizer.encode("漢")] == ["", "", "漢"]


def test_it_is_written_again(from_json, tmp_path):
    (tmp_path / from_json.file_name).write_bytes(from_json.to_bytes())
    assert Tokenizer.from_dir(tmp_path).encode("a red <loc0003> é") == from_json.encode("a red <loc0003> é")


@pytest.mark.parametrize("kind", ["tokenizer.json", "both", "added_tokens.json", "tokenizer_config.json"])
def test_tokens_behind_the_image_are_read_and_decoded(menu, tokenizer, kind):
    more, image = menu(kind), tokenizer.vocab_size
    assert more.vocab_size == image
    menu_id, end, sep = (image + 1 + i for i in range(3))
    assert more.encode("<s_menu>red</s_menu>sep token") == [menu_id, *tokenizer.encode("red"), end, sep]
    assert more.encode("<s_men>") == tokenizer.encode("<s_men>")
    assert more.encode("<image><bos>") == tokenizer.encode("<image><bos>"), "letters"
    assert more.decode([2, menu_id, image, end, image + 4, 1]) == "<s_menu></s_menu>"
    config = _config(image, rows=image + 64)
    more.check(config)
    assert more.added_ids(config) == ((image + 1, image + 4),)
    assert more.added_ids(_config(image, rows=image + 2)) == ((image + 1, image + 2),)
    assert tokenizer.added_ids(config) == (), "rows without a name"


def test_a_token_without_a_row_is_refused_where_it_is_used(menu, tokenizer):
    image = tokenizer.vocab_size
    processor = Processor(_config(image, rows=image + 2), menu("added_tokens.json"), ImageSettings(28))
    assert image + 1 in processor.layout([[0]], "<s_menu>").tokens
    with pytest.raises(PromptError, match=rf"^</s_menu> is id {image + 2} .* the model has {image + 2} rows"):
        processor.layout([[0]], "</s_menu>")


@pytest.mark.parametrize(
    ("flags", "text", "read"),
    [
        ({}, "red <s> cat", ["red ", "<s>", " cat"]),
        ({"lstrip": True}, "red  <s> cat", ["red", "<s>", " cat"]),
        ({"rstrip": True}, "red <s>  cat", ["red ", "<s>", "cat"]),
        ({"lstrip": True, "rstrip": True}, " <s> ", ["<s>"]),
        ({"single_word": True}, "a<s> <s>", ["a<s> ", "<s>"]),
        ({"single_word": True}, "<s>a", ["<s>a"]),
    ],
)
def test_flags_of_added_tokens(tokenizer_dir, tokenizer, write_tokenizer_json, tmp_path, flags, text, read):
    """The same with a SentencePiece model and its JSON files as with tokenizer.json."""
    added = tokenizer.vocab_size + 1
    expected = [id_ for part in read for id_ in ([added] if part == "<s>" else tokenizer.encode(part))]
    write_tokenizer_json(tmp_path, ("<s>",), **flags)
    assert Tokenizer.from_dir(tmp_path).encode(text) == expected
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    decoder = {added: {"content": "<s>"} | flags, added - 1: {"content": "<image>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert Tokenizer.from_dir(tmp_path).encode(text) == expected


_CUT = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
_FILL = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 1, "pad_type_id": 0, "pad_token": "<eos>"}


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(truncation=_CUT),
        lambda value: value.update(padding=_FILL | {"pad_to_multiple_of": None}),
        lambda value: value.update(normalizer=None, pre_tokenizer=None, post_processor=None, decoder=None),
        lambda value: value["model"].update(dropout=0.5, fuse_unk=False, byte_fallback=False),
        lambda value: value["model"].update(continuing_subword_prefix="##\u2028", end_of_word_suffix='"'),
    ],
)
def test_settings_that_are_not_gemmas_are_not_read(json_dir, from_json, tmp_path, change):
    value = json.loads((json_dir / "tokenizer.json").read_text())
    change(value)
    (tmp_path / "tokenizer.json").write_text("\ufeff" + json.dumps(value), encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).encode("a red circle 漢 é") == from_json.encode("a red circle 漢 é")


def test_merges_never_spell_a_control_token(json_dir, tmp_path):
    """Not even where a file's merges lead to one."""
    value = json.loads((json_dir / "tokenizer.json").read_text())
    vocabulary, merges = value["model"]["vocab"], value["model"]["merges"]
    image = value["added_tokens"][-1]
    for piece in ("<", "b", "o", "s", ">", "<b", "os", "os>"):
        vocabulary.setdefault(piece, len(vocabulary))
    image["id"] = len(vocabulary)
    merges[:0] = [["<", "b"], ["o", "s"], ["os", ">"], ["<b", "os>"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    odd = Tokenizer.from_dir(tmp_path)
    assert 2 not in odd.encode("a <bos>") and odd.decode(odd.encode("a <bos>")) == "a <bos>"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "is no tokenizer, or damaged"),
        (lambda text: "<html>", "is no tokenizer, or damaged"),
        (lambda text: text[: len(text) // 2], "is no tokenizer, or damaged"),
        (lambda text: '{"version": "1.0", "model": {"type": "BPE"}}', "is no tokenizer, or damaged"),
        (lambda text: text.replace('"<0xE6>"', '"<0xe6>"'), "does not give back a text"),
        (lambda text: text.replace('"<loc0005>"', '"<loc0006>"'), "<loc0005> is missing|is no tokenizer"),
        (lambda text: text.replace('"<eos>"', '"</s>"'), "has no <eos> token"),
        (lambda text: _without_merges(text, "WordLevel"), "is a WordLevel tokenizer, not Gemma's BPE"),
    ],
)
def test_a_damaged_file_is_one_line(json_dir, tmp_path, damage, message):
    text = (json_dir / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(damage(text), encoding="utf-8")
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)


def _without_merges(text: str, kind: str) -> str:
    value = json.loads(text)
    value["model"] = {"type": kind, "vocab": value["model"]["vocab"], "unk_token": "<unk>"}
    return json.dumps(value)


@pytest.mark.parametrize(
    "content", ['{"added_tokens": 3}', '{"added_tokens": [{"id": "x"}]}', '{"added_tokens": [[3]]}']
)
def test_a_list_of_added_tokens_that_is_none(tokenizer_dir, tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not list tokens"):
        Tokenizer.from_dir(tmp_path)


def test_bos_and_eos_are_those_that_the_files_name(tokenizer_dir, tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    file = tmp_path / "tokenizer_config.json"
    for pad in ("<eos>", "<loc0000>", "[PAD]", None, 5):
        file.write_text(json.dumps({"pad_token": pad, "bos_token": None}))
        found = Tokenizer.from_dir(tmp_path)
        assert (found.bos_id, found.eos_id) == (2, 1) and found.encode("a red") == tokenizer.encode("a red")
    file.write_text(json.dumps({"eos_token": {"content": "<mask>"}, "bos_token": "<bos>"}))
    found = Tokenizer.from_dir(tmp_path)
    assert (found.bos_id, found.eos_id) == (2, tokenizer.encode("<mask>")[0])
    processor = Processor(_config(tokenizer.vocab_size, 9999), found, ImageSettings(28))
    batch = processor.layout([[0]], "a", "b")
    assert batch.tokens[0, batch.length[0] - 1] == found.eos_id
    file.write_text(json.dumps({"eos_token": "<strange>"}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json has eos_token '<strange>', which is no token"):
        Tokenizer.from_dir(tmp_path)
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds a JSON list"):
        Tokenizer.from_dir(tmp_path)


def test_padding_is_a_row_of_the_table_whatever_the_file_says(tokenizer):
    config = _config(tokenizer.vocab_size, 9999)
    batches = []
    for pad in (0, 1, -1, 10**6):
        processor = Processor(dataclasses.replace(config, pad_token_id=pad), tokenizer, ImageSettings(28))
        batches.append(processor.layout([[0], [0]], ["a", "a longer prompt"]))
    for batch in batches:
        np.testing.assert_array_equal(batch.tokens, batches[0].tokens)


def _config(image: int, rows: int) -> PaliGemmaConfig:
    return PaliGemmaConfig(VisionConfig(image_size=28), TextConfig(vocab_size=rows), image_token_id=image)


@pytest.mark.parametrize("kind", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json", "both"])
def test_what_is_saved_reads_the_same(menu, kind, tmp_path_factory):
    tokenizer, out = menu(kind), tmp_path_factory.mktemp("saved")
    tokenizer.save(out)
    again = Tokenizer.from_dir(out)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    for text in ("<s_menu>a red circle</s_menu>", "<loc0012> x <seg003>", "caption en\n"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize(
    "added, message", [({"<a>": 1700, "<b>": 1700}, "have id 1700"), ({"<a>": None}, "image token")]
)
def test_ids_that_two_tokens_would_have_are_refused(tokenizer_dir, tokenizer, make_model, tmp_path, added, message):
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    image = tokenizer.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: id_ or image for name, id_ in added.items()}))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(tmp_path).check(make_model("gemma2").config)
