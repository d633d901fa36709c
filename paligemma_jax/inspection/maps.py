"""Maps over patches: norms, similarity to a text, similarity between patches, attention.

Patches are in row-major order, image after image; `grid` reshapes them. Images are resized to a square without keeping
their aspect ratio, so the grid covers the whole image, whatever its shape.

Axes: I images, N patches of an image, G = sqrt(N) patches of a side, T positions, L layers, D decoder width, n
answer tokens, M tokens of a text.
"""

import jax.numpy as jnp
import numpy as np

from paligemma_jax import ops
from paligemma_jax.api import PaliGemma
from paligemma_jax.engine.forward import Trace
from paligemma_jax.engine.steps import Params
from paligemma_jax.errors import PromptError
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.inspection.words import Word, find
from paligemma_jax.processing.tokenizer import Tokenizer


def grid(values: np.ndarray, num_patches: int) -> np.ndarray:
    """Values of patches [..., I * N] as a grid for each image, [..., I, G, G]; `num_patches` is N."""
    side = grid_side(num_patches)
    return values.reshape(*values.shape[:-1], -1, side, side)


def norms(soft_tokens: np.ndarray) -> np.ndarray:
    """Euclidean norms f32 [..., N] of soft tokens [..., N, D]."""
    return np.linalg.norm(np.asarray(soft_tokens, np.float32), axis=-1)


def centred_similarity(patches: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Similarity of each patch to a text, centred on the mean patch: f32 [N].

    With u(v) = v / |v|, and m the mean of u over the patches,

        similarity of p = (u(p) - m) . (mean of u(text) - m)

    All hidden states share a large common component, which plain cosine similarity mostly measures; so it is
    subtracted. The differences are not normalized again, which would weigh patches near the mean as much as others.

    Args:
      patches: [N, D], soft tokens or hidden states.
      text: [M, D], the text's tokens after the same layer.
    """
    patches, text = _unit(patches), _unit(text)
    mean = patches.mean(axis=0)
    return (patches - mean) @ (text.mean(axis=0) - mean)


def table_similarity(model: PaliGemma, soft_tokens: np.ndarray, text: str) -> np.ndarray:
    """`centred_similarity` of soft tokens [N, D] to the embeddings of a text's tokens, before any layer: f32 [N]."""
    return centred_similarity(
        soft_tokens, token_embeddings(model.params, model.processor.tokenizer.encode(f" {text.strip()}"))
    )


def hidden_similarity(trace: Trace, word: Word) -> np.ndarray:
    """`centred_similarity` of the patches to some tokens of the same pass, between all layers: f32 [L + 1, I * N].

    Entry 0 is of the input of the first layer, entry l of the output of layer l, counted from 1. `word` is a span of
    positions in the sequence, as from `find_in_prompt`.
    """
    layers = (np.asarray(hidden, np.float32) for hidden in trace.hidden)
    is_patch = trace.patches >= 0
    return np.stack([centred_similarity(hidden[is_patch], hidden[word.start : word.stop]) for hidden in layers])


def patch_similarity(trace: Trace) -> np.ndarray:
    """Cosine similarity between patches, averaged over the upper half of the layers: f32 [I * N, I * N].

    In each layer the mean of the unit vectors is subtracted first, as in `centred_similarity`.
    """
    num_layers = len(trace.hidden) - 1
    is_patch = trace.patches >= 0
    total = np.zeros((is_patch.sum(), is_patch.sum()), np.float32)
    upper = num_upper_layers(num_layers)
    for hidden in trace.hidden[-upper:]:
        total += similarity_between(np.asarray(hidden, np.float32)[is_patch]) / upper
    return total


def similarity_between(patches: np.ndarray) -> np.ndarray:
    """Cosine similarity f32 [N, N] between patches [N, D] whose unit vectors' mean is subtracted first."""
    directions = _unit(patches)
    centred = _unit(directions - directions.mean(axis=0))
    return centred @ centred.T


def attention(trace: Trace, renormalize: bool = False) -> np.ndarray:
    """Attention probabilities of each patch, at the position that predicts an answer token: f32 [L, heads, n, I * N].

    With `renormalize` they sum to one over the patches; else to one minus what falls on text. Both are zeros where a
    sliding window has left the image.
    """
    weights = trace.attention[..., trace.patches >= 0]
    if not renormalize:
        return weights
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def upper_half(maps: np.ndarray, num_layers: int) -> np.ndarray:
    """The mean over the upper half of the layers of maps [L, ...] or, of states between layers, [L + 1, ...].

    These locate objects best on the shipped model, see `shapes_world.pointing`.
    """
    return maps[-num_upper_layers(num_layers) :].mean(axis=0)


def num_upper_layers(num_layers: int) -> int:
    """Number of layers in the upper half."""
    return (num_layers + 1) // 2


def select_layer(maps: np.ndarray, num_layers: int, layer: int | None) -> np.ndarray:
    """One layer of maps [L, ...], or its output in states between layers [L + 1, ...]; None: `upper_half`.

    Layers are counted from 0.
    """
    return upper_half(maps, num_layers) if layer is None else maps[len(maps) - num_layers + layer]


def select_head(weights: np.ndarray, head: int | None) -> np.ndarray:
    """One head of attention [L, heads, ...], counted from 0, or with None the mean of all: [L, ...]."""
    return weights.mean(axis=1) if head is None else weights[:, head]


def layer_name(layer: int | None) -> str:
    """What `select_layer` selects, in words; layers are counted from 1."""
    return "mean of the upper layers" if layer is None else f"layer {layer + 1}"


def head_name(head: int | None) -> str:
    """What `select_head` selects, in words; heads are counted from 1."""
    return "mean of the heads" if head is None else f"head {head + 1}"


def find_in_prompt(trace: Trace, tokenizer: Tokenizer, text: str) -> Word:
    """The span of a text in the prompt of a trace, in positions of the sequence; PromptError if it does not occur."""
    start = int(np.flatnonzero(trace.patches >= 0)[-1]) + 1
    found = find(tokenizer, trace.tokens[start : trace.prefix_length].tolist(), text)
    return Word(found.text, start + found.start, start + found.stop)


def token_embeddings(params: Params, ids: list[int]) -> np.ndarray:
    """Rows f32 [M, D] of the token embedding table; PromptError without ids."""
    if not ids:
        raise PromptError("there is no text to compare with: give a word")
    weight = params["language_model"]["embed_tokens"]["weight"]
    return np.asarray(ops.take_rows(weight, jnp.asarray(ids)), np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., D] scaled to unit length; zeros stay zeros."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
