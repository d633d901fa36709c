"""Findings as figures: heat maps, sheets and tables, each with the arrays it shows.

Axes: L layers, n answer tokens with <eos>, N patches, k words.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from paligemma_jax.inspection import rendering
from paligemma_jax.inspection.findings import Findings, TopTokens
from paligemma_jax.inspection.maps import head_name, layer_name, select_head, select_layer


@dataclasses.dataclass(frozen=True)
class Figure:
    """A rendered image, and the arrays it shows by name; none when another figure has them."""

    name: str
    title: str
    image: Image.Image
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def figures(findings: Findings, layer: int | None = None, head: int | None = None) -> Iterator[Figure]:
    """All figures of some findings, one after the other.

    Args:
      layer: the one shown, counted from 0; None means the mean of the upper half of them.
      head: the one shown, counted from 0; None means the mean of all.
    """
    yield _heat_map(findings, "norms", "Norms of the soft tokens", findings.norms, findings.norms)
    if findings.table_similarity is not None:
        title = f'Similarity of soft tokens to "{findings.text}" in the table of tokens'
        yield _heat_map(findings, "similarity_table", title, findings.table_similarity, findings.table_similarity)
    if findings.hidden_similarity is not None:
        yield from _hidden_similarity(findings, layer)
    if findings.attention is not None:
        yield from _attention(findings, layer, head)
    if findings.occlusion is not None:
        yield from _occlusion(findings)
    if findings.nearest_tokens is not None:
        yield from _lens(findings, layer)
    title = "Soft tokens"
    image = rendering.embeddings(findings.soft_tokens, title)
    yield Figure("embeddings", title, image, {"embeddings": findings.soft_tokens})


def _lens(findings: Findings, layer: int | None) -> Iterator[Figure]:
    title, top = "Tokens nearest to each soft token, over their cosine", findings.nearest_tokens
    image = _worded(findings, title, top.texts, top.scores)
    yield Figure("lens_nearest", title, image, _arrays("lens_nearest", top, "cosines"))
    at = findings.num_layers if layer is None else layer + 1
    title, top = f"What layer {at} would say at each patch, over its probability", findings.patch_lens
    image = _worded(findings, title, top.texts[at], top.scores[at])
    yield Figure("lens_said", title, image, _arrays("lens_said", top, "probabilities"))
    top = findings.text_lens
    title = "What each layer would say after each token of the prompt and the answer, over its probability"
    best, probabilities = top.texts[..., 0].T, top.scores[..., 0].T
    image = rendering.table(best, probabilities, findings.text_pieces, _between(findings), title)
    yield Figure("lens_text", title, image, _arrays("lens_text", top, "probabilities"))


def _arrays(name: str, top: TopTokens, scores: str) -> dict[str, np.ndarray]:
    return {name: top.ids, f"{name}_{scores}": top.scores}


def _between(findings: Findings) -> list[str]:
    """Names of the L + 1 states between layers."""
    return ["before layer 1", *(f"after layer {i + 1}" for i in range(findings.num_layers))]


def _hidden_similarity(findings: Findings, layer: int | None) -> Iterator[Figure]:
    layers = findings.hidden_similarity
    shown = select_layer(layers, findings.num_layers, layer)
    about = f'Similarity of hidden states to "{findings.text}"'
    figure = _heat_map(findings, "similarity", f"{about}, {layer_name(layer)}", shown, layers)
    pairs = {"similarity_patches": findings.patch_similarity}
    yield dataclasses.replace(figure, arrays={**figure.arrays, **pairs})
    yield _sheet(findings, "similarity_layers", f"{about}, layer by layer", layers, _between(findings))


def _attention(findings: Findings, layer: int | None, head: int | None) -> Iterator[Figure]:
    weights = findings.attention  # [L, heads, n, N]
    shown = select_layer(select_head(weights, head), findings.num_layers, layer)
    which = f"{layer_name(layer)}, {head_name(head)}"
    words = [word.text for word in findings.words]
    title = f"Attention of each word of the answer, {which}"
    yield _sheet(findings, "attention", title, findings.word_means(shown), words, weights)
    title = f"Attention of the whole answer, {which}"
    yield _heat_map(findings, "attention_answer", title, shown.mean(axis=0), None)
    title = "Attention of the whole answer, each layer in a row and each head in a column"
    num_layers, num_heads = weights.shape[:2]
    captions = [f"layer {i + 1}, head {j + 1}" for i in range(num_layers) for j in range(num_heads)]
    values = weights.mean(axis=2).reshape(len(captions), -1)
    yield _sheet(findings, "attention_heads", title, values, captions, columns=num_heads)


def _occlusion(findings: Findings) -> Iterator[Figure]:
    title = "Log-probability that the answer loses where the picture is hidden"
    yield _heat_map(findings, "occlusion", title, findings.occlusion.sum(axis=0), findings.occlusion)
    title = "Log-probability that each word loses where the picture is hidden"
    words = [word.text for word in findings.words]
    values = np.stack([findings.occlusion[word.start : word.stop].sum(axis=0) for word in findings.words])
    yield _sheet(findings, "occlusion_words", title, values, words, shared=True)


def _heat_map(findings: Findings, name: str, title: str, values: np.ndarray, array: np.ndarray | None) -> Figure:
    """A heat map of values [N]; `array` [..., N] is what they were computed from."""
    image = rendering.heat_map(findings.image, findings.grid(values), title)
    return Figure(name, title, image, {} if array is None else {name: findings.grid(array)})


def _sheet(
    findings: Findings,
    name: str,
    title: str,
    values: np.ndarray,
    captions: list[str],
    array: np.ndarray | None = None,
    **options,
) -> Figure:
    """A sheet of heat maps [M, N] with captions."""
    image = rendering.sheet(findings.image, findings.grid(values), captions, title, **options)
    return Figure(name, title, image, {} if array is None else {name: findings.grid(array)})


def _worded(findings: Findings, title: str, texts: np.ndarray, scores: np.ndarray) -> Image.Image:
    """The best token of texts [N, k] on each patch."""
    return rendering.worded(findings.image, findings.grid(texts[:, 0]), findings.grid(scores[:, 0]), title)
