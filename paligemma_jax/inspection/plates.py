"""Findings as pictures to look at, each with the array it shows.

Axes: G patches of a side, L layers, n answer tokens with <eos>, N patches, D decoder width, k words.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from PIL import Image

from paligemma_jax.inspection import pictures
from paligemma_jax.inspection.findings import Findings
from paligemma_jax.inspection.maps import grid, upper_half


@dataclasses.dataclass(frozen=True)
class Plate:
    """A picture, and what is in it as numbers; None when another plate has them."""

    name: str
    title: str
    image: Image.Image
    array: np.ndarray | None


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
        title, ranked = "Tokens nearest to each soft token, over their cosine", findings.nearest
        yield Plate("lens_nearest", title, _worded(findings, title, ranked.texts, ranked.scores), ranked.ids)
    if findings.said is not None:
        at = findings.num_layers if layer is None else layer + 1
        title, ranked = f"What layer {at} would say at each patch, over its probability", findings.said
        yield Plate("lens_said", title, _worded(findings, title, ranked.texts[at], ranked.scores[at]), ranked.ids)
    title = "Soft tokens"
    yield Plate("embeddings", title, pictures.embeddings(findings.soft_tokens, title), findings.soft_tokens)


def _hidden_similarity(findings: Findings, layer: int | None) -> Iterator[Plate]:
    layers = findings.hidden_similarity
    shown = upper_half(layers, findings.num_layers) if layer is None else layers[layer + 1]
    about = f'Likeness of hidden states to "{findings.text}"'
    yield _heat_map(findings, "similarity", f"{about}, {_layer(layer)}", shown, layers)
    captions = ["before layer 1", *(f"after layer {i + 1}" for i in range(findings.num_layers))]
    yield _sheet(findings, "similarity_layers", f"{about}, layer by layer", layers, captions)


def _attention(findings: Findings, layer: int | None, head: int | None) -> Iterator[Plate]:
    weights = findings.attention  # [L, heads, n, N]
    heads = weights.mean(axis=1) if head is None else weights[:, head]
    shown = upper_half(heads, findings.num_layers) if layer is None else heads[layer]
    which = f"{_layer(layer)}, {'mean of the heads' if head is None else f'head {head + 1}'}"
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
    image = pictures.heat_map(findings.picture, grid(values), title)
    return Plate(name, title, image, None if array is None else grid(array))


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
    image = pictures.sheet(findings.picture, grid(values), captions, title, **options)
    return Plate(name, title, image, None if array is None else grid(array))


def _worded(findings: Findings, title: str, texts: np.ndarray, scores: np.ndarray) -> Image.Image:
    """The best of the texts [N, k] on each patch."""
    return pictures.worded(findings.picture, grid(texts[:, 0]), grid(scores[:, 0]), title)


def _layer(layer: int | None) -> str:
    return "mean of the upper layers" if layer is None else f"layer {layer + 1}"
