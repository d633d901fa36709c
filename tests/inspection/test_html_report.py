"""The report: one file that asks nothing of anyone, and believes nothing it is told."""

import base64
import dataclasses
import html.parser
import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.inspection import rendering
from paligemma_jax.inspection.figures import figures
from paligemma_jax.inspection.findings import TopTokens
from paligemma_jax.inspection.report import report
from paligemma_jax.inspection.words import Word

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & {{data}}"


class _Reader(html.parser.HTMLParser):
    """Elements with their attributes, and all text outside of style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text.append(data)


def _data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def _values(item: dict) -> np.ndarray:
    steps = np.frombuffer(base64.b64decode(item["values"]), np.uint8)
    return item["low"] + (item["high"] - item["low"]) * steps / 255


@pytest.fixture(scope="module")
def page(findings) -> str:
    return report(findings, {figure.title: figure.image for figure in figures(findings)}, "a model, a picture")


def test_an_installed_package_carries_the_page():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "paligemma_jax" / "inspection"
    carried = {path for pattern in settings["paligemma_jax.inspection"] for path in folder.glob(pattern)}
    assert {path.name for path in carried} == {"page.html", "style.css", "script.js"}


def test_nothing_is_fetched(page):
    plain = re.sub(r'base64,[^"]*|"values":"[^"]*"', "", page)
    assert not re.search(r"https?:|//[a-z]|@import|\bfetch\b|XMLHttp|url\(", plain)
    for tag, attributes in _Reader(page).elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "default-src 'none'" in page


def test_it_can_be_read_without_its_script(page, findings):
    reader = _Reader(page)
    text = "".join(reader.text)
    assert all(part in text for part in (findings.prompt, "<loc1000>", "circle", "a model, a picture", "9 patches"))
    images = [attributes["alt"] for tag, attributes in reader.elements if tag == "img"]
    assert images == ["The picture", *(figure.title for figure in figures(findings))]


def test_a_wide_picture_keeps_its_size(findings):
    images = {"narrow": Image.new("RGB", (500, 9)), "wide": Image.new("RGB", (2500, 9))}
    elements = _Reader(report(findings, images)).elements
    assert [attributes["alt"] for _, attributes in elements if attributes.get("class") == "wide"] == ["wide"]


def test_texts_are_only_text(findings, page):
    texts = np.full_like(findings.nearest_tokens.texts, EVIL)
    nearest = TopTokens(findings.nearest_tokens.ids, texts, findings.nearest_tokens.scores)
    words = [dataclasses.replace(word, text=EVIL) for word in findings.words]
    evil = dataclasses.replace(findings, prompt=EVIL, text=EVIL, words=words, nearest_tokens=nearest)
    images = {EVIL: next(figures(findings)).image}
    reader, plain = _Reader(found := report(evil, images, EVIL)), _Reader(page)
    assert {tag for tag, _ in reader.elements} == {tag for tag, _ in plain.elements}
    assert sum(tag == "script" for tag, _ in reader.elements) == 2
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    assert EVIL in "".join(reader.text)
    assert _data(found)["texts"][0] == EVIL and _data(found)["words"] == [EVIL] * len(words)


def test_maps_are_those_of_the_findings(findings, page):
    data, values = _data(page), _values
    assert [kind["name"] for kind in data["kinds"]] == ["Attention", "Similarity", "Occlusion", "Table", "Norms"]
    attention, similarity, *_, norms = data["kinds"]
    word_means = findings.word_means(findings.attention.mean(axis=1))
    assert len(attention["maps"]) == len(attention["layers"]) == 4 and len(attention["maps"][0]) == 8
    for layer in range(3):
        expected = word_means[layer, 2]
        np.testing.assert_allclose(
            values(attention["maps"][1 + layer][3]), expected, atol=np.ptp(expected) / 200 + 1e-6
        )
    expected = findings.hidden_similarity[2]
    np.testing.assert_allclose(values(similarity["maps"][3][0]), expected, atol=np.ptp(expected) / 200)
    np.testing.assert_allclose(values(norms["maps"][0][0]), findings.norms, atol=np.ptp(findings.norms) / 200)
    first = [data["texts"][place] for place, _ in data["nearest"][4]]
    assert len(first) == 3 and first[0] == (findings.nearest_tokens.texts[4, 0].strip() or first[0])
    assert len(data["patch_lens"]) == 4 and len(data["patch_lens"][0]) == 9


def test_each_patch_has_a_map_of_its_similarity_to_others(findings, page):
    pairs = _data(page)["patch_similarity"]
    triangle = _values(pairs)
    found = [[triangle[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(9)] for i in range(9)]
    np.testing.assert_allclose(found, findings.patch_similarity, atol=2 / 255)
    assert "mean of the upper layers" in pairs["title"]
    many = dataclasses.replace(findings, patch_similarity=np.ones((1025, 1025), np.float32))
    assert _data(report(many, {}))["patch_similarity"] is None  # its pairs would make the file large


def test_what_is_said_in_place_of_each_word(findings, page):
    data = _data(page)
    assert np.shape(data["text_lens"]) == (4, len(findings.text_pieces), 3, 2)
    count = len(findings.answer_pieces)
    for word, (start, stop) in zip(findings.words, data["spans"], strict=True):
        assert stop - start == word.stop - word.start
        for place in range(start, stop):
            said, _ = data["text_lens"][3][place][0]
            said_ids = findings.text_lens.texts[-1, -count:, 0]
            assert data["texts"][said] == rendering.printable(said_ids[word.start + place - start])


def test_probabilities_of_words_are_shown(findings, page):
    text = "".join(_Reader(page).text)
    for word in findings.words:
        chance = math.exp(findings.logprobs[word.start : word.stop].sum())
        assert f"{word.text}{chance:.2f}" in text


def test_the_probability_of_a_word_is_that_of_all_its_tokens(findings):
    count = len(findings.logprobs)
    words = [Word("two", 0, 2), Word("rest", 2, count)]
    likely = dataclasses.replace(findings, words=words, logprobs=np.log([0.5, 0.5, *[1.0] * (count - 3), 0.75]))
    text = "".join(_Reader(report(likely, {})).text)
    assert "two0.25" in text and "rest0.75" in text


def test_a_head_can_be_chosen_and_little_will_do(findings):
    few = dataclasses.replace(
        findings,
        table_similarity=None,
        hidden_similarity=None,
        patch_similarity=None,
        occlusion=None,
        nearest_tokens=None,
    )
    few = dataclasses.replace(few, patch_lens=None, text_lens=None)
    data = _data(report(few, {}, head=2))
    assert [kind["title"] for kind in data["kinds"]] == ["Attention to the patches, head 3", "Norms of the soft tokens"]
    assert not {"patch_lens", "text_lens"} & set(data) and data["patch_similarity"] is None


def test_a_large_picture_makes_no_huge_file(findings):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9999, (27, 1024, 5))
    many = dataclasses.replace(
        findings,
        num_layers=26,
        norms=rng.random(1024),
        attention=rng.random((26, 1, len(findings.logprobs), 1024)),
        patch_lens=TopTokens(ids, ids.astype(str).astype(object), rng.random(ids.shape)),
        nearest_tokens=None,
        occlusion=None,
        table_similarity=None,
        hidden_similarity=None,
        patch_similarity=rng.random((1024, 1024)),
    )
    assert len(report(many, {})) < 2.5e6
