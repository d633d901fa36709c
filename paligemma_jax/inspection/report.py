"""Findings as one self-contained HTML file: images are data URIs, style and script are inlined.

The page, its style and its script are files in `report_page/`, templates with {{marks}} to fill.

Maps are quantized to 256 levels between their own extremes; the .npy files hold them exactly.
"""

import base64
import html
import importlib.resources
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.inspection import overlay, rendering
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.inspection.findings import Findings, TopTokens
from paligemma_jax.inspection.maps import head_name, layer_name, select_head, select_layer
from paligemma_jax.tasks.detection import Detection

_MAX_TOKENS_EACH = {"nearest": 5, "patch_lens": 3, "text_lens": 3}  # tokens listed at a position, of each layer
_MAX_TOKENS = 50_000  # in all; with many patches and layers fewer each

_MAX_PAIRED_PATCHES = 1024  # all pairs of so many patches take half a megabyte
_WIDE = 1800  # pixels: a wider figure, full of words, keeps its size and is scrolled

_MARK = re.compile(r"\{\{(\w+)\}\}")


def report(
    findings: Findings,
    figures: Mapping[str, Image.Image],
    source: str = "",
    head: int | None = None,
    objects: Sequence[Detection] = (),
    loc_scale: int = 1023,
) -> str:
    """The page.

    Args:
      figures: all figures by title, for readers without scripts, and to be copied.
      source: names of the model and of the image's file, to be shown.
      head: whose attention is shown, counted from 0; None means the mean of all.
      objects: of the answer, in pixels of the findings' image, drawn over it.
      loc_scale: the location that means the far edge.
    """
    image = rendering.displayed(findings.image)
    described = [source, f"{len(findings.norms)} patches", f"{findings.num_layers} layers"]
    marks = {
        "title": html.escape(f"Inside: {findings.prompt}"),
        "prompt": html.escape(findings.prompt.strip() or "(no prompt)"),
        "meta": html.escape(", ".join(filter(None, described))),
        "image": _data_uri(image),
        "words": "\n".join(map(_word, (word.text for word in findings.words), _word_probabilities(findings))),
        "figures": "\n".join(_figure(title, image) for title, image in figures.items()),
        "objects": overlay.objects_layer(objects, findings.image.size),
        "data": _json(_data(findings, head, loc_scale)),
        "style": _filled(_read("style.css"), {"gradient": ",".join(rendering.INFERNO), "width": str(image.width)}),
        "script": _read("script.js"),
    }
    return _filled(_read("page.html"), marks)


def _read(name: str) -> str:
    """A template of the page."""
    return (importlib.resources.files("paligemma_jax.inspection") / "report_page" / name).read_text(encoding="utf-8")


def _filled(template: str, marks: Mapping[str, str]) -> str:
    """The template with its marks replaced in one pass: a {{mark}} in a value stays as it is."""
    return _MARK.sub(lambda found: marks[found[1]], template)


def _json(value: Any) -> str:
    """JSON that is safe in a script element: no tag can begin in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _data(findings: Findings, head: int | None, loc_scale: int) -> dict[str, Any]:
    """What the script needs."""
    texts: dict[str, int] = {}
    ranked = {
        "nearest": findings.nearest_tokens,
        "patch_lens": findings.patch_lens,
        "text_lens": findings.text_lens,
    }
    most = {
        name: min(_MAX_TOKENS_EACH[name], max(1, _MAX_TOKENS // math.prod(item.texts.shape[:-1])))
        for name, item in ranked.items()
        if item is not None
    }
    return {
        "side": grid_side(len(findings.norms)),
        "colors": rendering.INFERNO,
        "words": [word.text for word in findings.words],
        "norms": [_rounded(value) for value in findings.norms],
        "kinds": _kinds(findings, head),
        "spans": _spans(findings),
        "locations": overlay.locations(findings.words, findings.image.size, loc_scale),
        "patch_similarity": _pair_similarity(findings.patch_similarity),
        **{name: _ranked(ranked[name], count, texts) for name, count in most.items()},
        "texts": list(texts),
    }


def _spans(findings: Findings) -> list[tuple[int, int]]:
    """The positions of `text_lens` that predict each word."""
    first = len(findings.text_pieces) - len(findings.answer_pieces)
    return [(first + word.start, first + word.stop) for word in findings.words]


def _pair_similarity(similarity: np.ndarray | None) -> dict[str, Any] | None:
    """The lower triangle of a similarity matrix [N, N], row by row: one map of N (N + 1) / 2 values."""
    if similarity is None or len(similarity) > _MAX_PAIRED_PATCHES:
        return None
    title = f"Similarity (cosine without the mean patch) of hidden states, {layer_name(None)}, to the patch"
    return {"title": title, **_maps(similarity[np.tril_indices(len(similarity))][None])[0]}


def _kinds(findings: Findings, head: int | None) -> list[dict[str, Any]]:
    """The maps that can be chosen: each by layer, the mean of the upper ones first, and by word where they differ."""
    after = [f"layer {i + 1}" for i in range(findings.num_layers)]
    upper = layer_name(None)
    kinds = []
    if findings.attention is not None:
        layers = _with_upper(select_head(findings.attention, head), findings.num_layers)
        kinds.append(
            {
                "name": "Attention",
                "title": f"Attention to the patches, {head_name(head)}",
                "maps": [_maps(_by_word(findings, layer)) for layer in layers],
                "layers": [upper, *after],
                "words": True,
                "unit": "attention probability",
            }
        )
    if findings.hidden_similarity is not None:
        layers = _with_upper(findings.hidden_similarity, findings.num_layers)
        kinds.append(
            {
                "name": "Similarity",
                "title": f"Similarity of hidden states to “{findings.text}”",
                "maps": [_maps(layer[None]) for layer in layers],
                "layers": [upper, "before layer 1", *(f"after {name}" for name in after)],
                "unit": "cosine",
            }
        )
    if findings.occlusion is not None:
        title = "Log-probability that is lost where the picture is hidden"
        summed = np.concatenate([findings.occlusion.sum(axis=0)[None], findings.word_means(findings.occlusion)])
        kinds.append({"name": "Occlusion", "title": title, "maps": [_maps(summed)], "words": True, "unit": "nats"})
    if findings.table_similarity is not None:
        title = f"Similarity of soft tokens to the table’s “{findings.text}”"
        kinds.append(
            {"name": "Table", "title": title, "maps": [_maps(findings.table_similarity[None])], "unit": "cosine"}
        )
    norms = _maps(findings.norms[None])
    kinds.append({"name": "Norms", "title": "Norms of the soft tokens", "maps": [norms], "unit": "norm"})
    return kinds


def _with_upper(layers: np.ndarray, num_layers: int) -> np.ndarray:
    return np.concatenate([select_layer(layers, num_layers, None)[None], layers])


def _by_word(findings: Findings, values: np.ndarray) -> np.ndarray:
    """Means of values of tokens [n, N] over the whole answer and over each word [1 + words, N]."""
    return np.concatenate([values.mean(axis=0)[None], findings.word_means(values)])


def _maps(values: np.ndarray) -> list[dict[str, Any]]:
    """Maps [M, N] quantized to 256 levels each, as base64."""
    found = []
    for item in values:
        low, high = rendering.extremes(item)
        levels = np.round(255 * np.nan_to_num(rendering.scaled(item))).astype(np.uint8)
        packed = base64.b64encode(levels.tobytes()).decode()
        found.append({"low": _rounded(low), "high": _rounded(high), "values": packed})
    return found


def _ranked(ranked: TopTokens, most: int, texts: dict[str, int]) -> list[Any]:
    """Nested lists like the arrays, of (index of a text, score); new texts are added to `texts`."""

    def nested(names: np.ndarray, scores: np.ndarray) -> list[Any]:
        if names.ndim > 1:
            return [nested(*pair) for pair in zip(names, scores, strict=True)]
        pairs = list(zip(names, scores, strict=True))[:most]
        return [(texts.setdefault(rendering.printable(name), len(texts)), _rounded(score)) for name, score in pairs]

    return nested(ranked.texts, ranked.scores)


def _word_probabilities(findings: Findings) -> Sequence[float]:
    """The probability of each word: the product over its tokens."""
    return [math.exp(findings.logprobs[word.start : word.stop].sum()) for word in findings.words]


def _word(text: str, probability: float) -> str:
    return f'<button type="button" class="word">{html.escape(text)}<small>{probability:.2f}</small></button>'


def _figure(title: str, image: Image.Image) -> str:
    name = html.escape(title)
    wide = ' class="wide"' if image.width > _WIDE else ""
    return f'<details><summary>{name}</summary><div><img src="{_data_uri(image)}" alt="{name}"{wide}></div></details>'


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rounded(value: float) -> float:
    """Four significant digits, which keep the file small."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
