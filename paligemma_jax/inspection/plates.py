"""Findings as pictures to look at, each with the arrays it shows.

Axes: L layers, n answer tokens with <eos>, N patches, k words.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from paligemma_jax.inspection import pictures
from paligemma_jax.inspection.findings import Findings, Ranked
from paligemma_jax.inspection.maps import head_name, layer_name, of_head, of_layer


@dataclasses.dataclass(frozen=True)
class Plate:
    """A picture, and what is in it as arrays by name; none when another plate has them."""

    name: str
    title: str
    image: Image.Image
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def plates(findings: Findings, layer: int | None = None, head: int | None = None) -> Iterator[Plate]:
    """All that was found, one after the other.

    Args:
      layer: the one shown, counted from 0; None means the mean of the upper half of them.
      head: the one shown, counted from 0; None means the mean of all.
    """
    yield _heat_map(findings, "norms", "Norms of the soft tokens", findings.norms, findings.norms)
    if findings.table_similarity is not None:
        title = f'Likeness of soft tokens to "{findings.text}" in the table of tokens'
        yield _heat_map(findings, "similarity_table", title, findings.table_similarity, findings.table_similarity)
    if findings.hidden_similarity is not None:
        yield from _hidden_similarity(findings, layer)
    if findings.attention is not None:
        yield from _attention(findings, layer, head)
    if findings.occlusion is not None:
        yield from _occlusion(findings)
    if findings.nearest is not None:
        yield from _lens(findings, layer)
    title = "Soft tokens"
    image = pictures.embeddings(findings.soft_tokens, title)
    yield Plate("embeddings", title, image, {"embeddings": findings.soft_tokens})


def _lens(findings: Findings, layer: int | None) -> Iterator[Plate]:
    title, ranked = "Tokens nearest to each soft token, over their cosine", findings.nearest
    image = _worded(findings, title, ranked.texts, ranked.scores)
    yield Plate("lens_nearest", title, image, _arrays("lens_nearest", ranked, "cosines"))
    at = findings.num_layers if layer is None else layer + 1
    title, ranked = f"What layer {at} would say at each patch, over its probability", findings.said
    image = _worded(findings, title, ranked.texts[at], ranked.scores[at])
    yield Plate("lens_said", title, image, _arrays("lens_said", ranked, "probabilities"))
    ranked = findings.said_after
    title = "What each layer would say after each token of the prompt and the answer, over its probability"
    best, chances = ranked.texts[..., 0].T, ranked.scores[..., 0].T
    image = pictures.table(best, chances, findings.read, _between(findings), title)
    yield Plate("lens_text", title, image, _arrays("lens_text", ranked, "probabilities"))


def _arrays(name: str, ranked: Ranked, scores: str) -> dict[str, np.ndarray]:
    return {name: ranked.ids, f"{name}_{scores}": ranked.scores}


def _between(findings: Findings) -> list[str]:
    """Names of the L + 1 places between layers."""
    return ["before layer 1", *(f"after layer {i + 1}" for i in range(findings.num_layers))]


def _hidden_similarity(findings: Findings, layer: int | None) -> Iterator[Plate]:
    layers = findings.hidden_similarity
    shown = of_layer(layers, findings.num_layers, layer)
    about = f'Likeness of hidden states to "{findings.text}"'
    plate = _heat_map(findings, "similarity", f"{about}, {layer_name(layer)}", shown, layers)
    alike = {"similarity_patches": findings.patch_similarity}
    yield dataclasses.replace(plate, arrays={**plate.arrays, **alike})
    yield _sheet(findings, "similarity_layers", f"{about}, layer by layer", layers, _between(findings))


def _attention(findings: Findings, layer: int | None, head: int | None) -> Iterator[Plate]:
    weights = findings.attention  # [L, heads, n, N]
    shown = of_layer(of_head(weights, head), findings.num_layers, layer)
    which = f"{layer_name(layer)}, {head_name(head)}"
    words = [word.text for word in findings.words]
    title = f"Attention of each word of the answer, {which}"
    yield _sheet(findings, "attention", title, findings.of_words(shown), words, weights)
    title = f"Attention of the whole answer, {which}"
    yield _heat_map(findings, "attention_answer", title, shown.mean(axis=0), None)
    title = "Attention of the whole answer, each layer in a row and each head in a column"
    num_layers, num_heads = weights.shape[:2]
    captions = [f"layer {i + 1}, head {j + 1}" for i in range(num_layers) for j in range(num_heads)]
    values = weights.mean(axis=2).reshape(len(captions), -1)
    yield _sheet(findings, "attention_heads", title, values, captions, columns=num_heads)


def _occlusion(findings: Findings) -> Iterator[Plate]:
    title = "Log-probability that the answer loses where the picture is hidden"
    yield _heat_map(findings, "occlusion", title, findings.occlusion.sum(axis=0), findings.occlusion)
    title = "Log-probability that each word loses where the picture is hidden"
    words = [word.text for word in findings.words]
    values = np.stack([findings.occlusion[word.start : word.stop].sum(axis=0) for word in findings.words])
    yield _sheet(findings, "occlusion_words", title, values, words, shared=True)


def _heat_map(findings: Findings, name: str, title: str, values: np.ndarray, array: np.ndarray | None) -> Plate:
    """A map [N] that was made of `array` [..., N]."""
    image = pictures.heat_map(findings.picture, findings.grid(values), title)
    return Plate(name, title, image, {} if array is None else {name: findings.grid(array)})


def _sheet(
    findings: Findings,
    name: str,
    title: str,
    values: np.ndarray,
    captions: list[str],
    array: np.ndarray | None = None,
    **options,
) -> Plate:
    """Maps [M, N] with their captions."""
    image = pictures.sheet(findings.picture, findings.grid(values), captions, title, **options)
    return Plate(name, title, image, {} if array is None else {name: findings.grid(array)})


def _worded(findings: Findings, title: str, texts: np.ndarray, scores: np.ndarray) -> Image.Image:
    """The best of the texts [N, k] on each patch."""
    return pictures.worded(findings.picture, findings.grid(texts[:, 0]), findings.grid(scores[:, 0]), title)
