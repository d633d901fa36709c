"""What transformers saves besides weights, live: tokenizer.json, and which ids end an answer."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.processing.tokenizer import Tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

_PARTS = [
    *("<loc0000>", "<loc1023>", "<loc1024>", "<loc12>", "<seg000>", "<seg127>", "<seg128>", "<seg", "<loc"),
    *("\n", "\n\n", "\r", "\r\n", "\t", " ", "  ", " " * 17, "\0", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", "\xa0"),
    *("\u2028", "\u2029", "\u3000", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u202e", "\u2066", "e\u0301", "\u0301"),
    *("क्षि", "العربية", "שָׁלוֹם", "한국어", "漢字", "ไทย", "😀", "👨‍👩‍👧‍👦", "🇩🇪", "𝔘", "\U0010ffff", "\ue000", "\ufffd"),
    *("ﬁ", "Å", "ß", "İ", "²", "½", "٣", "<table>", "</b>", "<h1>", "<mask>", "<unused0>", "<start_of_turn>"),
    *("▁", "▁▁", "<0x0A>", "<0x", "cat", " red", "Detect", "segment ", "caption en", " ; ", "a", "A", "3.14", "\\n"),
    *("<s_menu>", "</s_menu>", "<s_menu", "<", ">", "é", "-", "_", "'", "{}", "http://a.b/c?d=e&f"),
]


def _odd_texts(count: int) -> list[str]:
    draw = random.Random(0)

    def text() -> str:
        if draw.random() < 0.2:
            codes = (draw.randrange(0x110000) for _ in range(draw.randint(1, 12)))
            return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        return "".join(draw.choice(_PARTS) for _ in range(draw.randint(1, 9)))

    return ["", *_PARTS, *(text() for _ in range(count))]


@pytest.fixture(scope="module", params=[(), ("<s_menu>", "</s_menu>")], ids=["plain", "fine-tune"])
def saved(request, tokenizer_dir, tmp_path_factory) -> Path:
    """A tokenizer as transformers saves it, with the tokens that PaliGemma's processor adds, and a fine-tune's."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.GemmaTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens([*request.param[:1]])
    tokenizer.add_tokens([*request.param[1:]], special_tokens=True)
    directory = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(directory)
    assert not (directory / "tokenizer.model").exists()
    return directory


def test_ids_and_texts_are_those_of_transformers(saved):
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.AutoTokenizer.from_pretrained(saved), Tokenizer.from_dir(saved)
    texts = _odd_texts(10_000)
    expected = reference(texts, add_special_tokens=False).input_ids
    assert [ours.encode(text) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == reference.batch_decode(expected)
    for name in ("bos_id", "eos_id"):
        assert getattr(ours, name) == getattr(reference, name.replace("_id", "_token_id"))


def test_control_tokens_alone_are_read_differently(saved):
    """transformers lets a prompt say <bos>, <eos> and <image>; here they are letters, and the rest is the same."""
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.AutoTokenizer.from_pretrained(saved), Tokenizer.from_dir(saved)
    for text in ("<bos>", "a<eos> b", "<image><image>red", "<pad>\n", "<unk>"):
        ids = reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == ids != reference(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def model(saved, small_configs, tmp_path_factory):
    """A random model over that tokenizer in transformers, saved with two ids that end an answer, and what it says."""
    pytest.importorskip("torch")
    import torch_reference

    tokenizer = Tokenizer.from_dir(saved)
    geometry = small_configs["gemma"]
    text = dataclasses.replace(geometry.text, vocab_size=tokenizer.vocab_size + 64, query_scalar=6.0)
    config = dataclasses.replace(
        geometry, text=text, image_token_id=tokenizer.vocab_size, eos_token_id=text.vocab_size - 1
    )
    model = torch_reference.random_model(dataclasses.replace(config, pad_token_id=1))
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    for file in saved.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return torch_reference, model, directory, config


def _spare(ours: pj.PaliGemma) -> list[int]:
    named = np.concatenate([np.arange(*ids) for ids in ours.config.text_ids])
    return sorted({*range(ours.config.text.vocab_size)} - {*named.tolist()})


PROMPTS = ["caption en", "detect a red circle", "answer en how many"]


def test_any_of_several_ids_ends_an_answer(model):
    reference, theirs, directory, config = model
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    ours = pj.load(directory, dtype="float32")
    spare = _spare(ours)
    assert ours.config.eos_token_id == spare[-1] == config.eos_token_id, "never said, so answers are long"
    long = [reference.greedy(theirs, ours.processor(image, prompt), 12, suppress_tokens=spare)[0] for prompt in PROMPTS]
    assert [len(answer) for answer in long] == [12] * 3
    ends = [int(long[0][4]), int(long[1][7])]
    file = directory / "generation_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"eos_token_id": ends}))
        again = reference.read_model(directory)
        assert again.generation_config.eos_token_id == ends
        ours = pj.load(directory, dtype="float32")
        assert ours.config.eos_token_ids == tuple(ends)
        reasons = set()
        for prompt, output in zip(PROMPTS, ours.generate([image] * 3, PROMPTS, 12), strict=True):
            expected = reference.greedy(again, ours.processor(image, prompt), 12, suppress_tokens=spare)[0]
            np.testing.assert_array_equal(output.tokens, expected)
            reasons.add(output.finish_reason)
        assert "eos" in reasons
        for num_beams in (2, 4):
            beams = ours.generate(image, PROMPTS[1], 12, pj.Sampling(num_beams=num_beams))[0]
            options = {"suppress_tokens": spare, "num_beams": num_beams}
            expected = reference.greedy(again, ours.processor(image, PROMPTS[1]), 12, **options)[0]
            np.testing.assert_array_equal(beams.tokens, expected[: len(beams.tokens)])
        ours.save(directory / "again")
        assert pj.load(directory / "again", dtype="float32").config == ours.config
    finally:
        file.write_text(before)


def test_tokens_behind_the_image_are_said_and_spare_rows_are_not(model):
    *_, directory, config = model
    ours = pj.load(directory, dtype="float32")
    spare = _spare(ours)
    assert config.image_token_id in spare
    image = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    added = [id_ for first, end in ours.config.added_ids for id_ in range(first, end)]
    table = np.array(ours.params["language_model"]["embed_tokens"]["weight"], np.float32)
    assert len(added) in (0, 2)
    [first] = ours.generate(image, "caption en", 1)
    table[config.image_token_id :] = 1.5 * table[first.tokens[0]]  # what would be said, but for spare rows
    ours.params["language_model"]["embed_tokens"]["weight"] = jax.numpy.asarray(table)
    [output] = ours.generate(image, "caption en", 1)
    assert output.tokens[0] == (added[0] if added else first.tokens[0])
    assert output.text == (ours.processor.tokenizer.decode(added[:1]) if added else first.text)
