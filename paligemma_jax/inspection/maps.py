"""What a model makes of each patch of a picture, as arrays over patches.

Patches are in reading order, picture after picture; `grid` makes them squares. A picture is squeezed to a square before
it is cut, so the grid lies over the whole of it, whatever its shape.

Axes: I pictures, N patches of a picture, G = sqrt(N) patches of a side, T positions, L layers, D decoder width, n
answer tokens, M tokens of a text.
"""

import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import PromptError
from paligemma_jax.generation.engine import Params
from paligemma_jax.generation.output import Trace
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.inspection.words import Word, find
from paligemma_jax.models.quantized import rows_of
from paligemma_jax.pipeline import PaliGemma
from paligemma_jax.processing.tokenizer import Tokenizer


def grid(values: np.ndarray, num_patches: int) -> np.ndarray:
    """Values of patches [..., I * N] as a square for each picture, [..., I, G, G]; `num_patches` is N."""
    side = grid_side(num_patches)
    return values.reshape(*values.shape[:-1], -1, side, side)


def norms(soft_tokens: np.ndarray) -> np.ndarray:
    """Lengths f32 [..., N] of soft tokens [..., N, D]."""
    return np.linalg.norm(np.asarray(soft_tokens, np.float32), axis=-1)


def likeness(patches: np.ndarray, text: np.ndarray) -> np.ndarray:
    """How much each patch is like a text, beside the mean patch: f32 [N].

    With u the direction of a vector, and m the mean of u over the patches,

        likeness of p = (u(p) - m) . (mean of u(text) - m)

    All vectors of a decoder share a large part, which plain cosines mostly measure. A cosine of the differences would
    make as much of patches that are nearly the mean one as of those that stand out, so they are not scaled again.

    Args:
      patches: [N, D], soft tokens or hidden states.
      text: [M, D], the text's tokens at the same place of the network.
    """
    patches, text = _directions(patches), _directions(text)
    mean = patches.mean(axis=0)
    return (patches - mean) @ (text.mean(axis=0) - mean)


def table_similarity(model: PaliGemma, soft_tokens: np.ndarray, text: str) -> np.ndarray:
    """`likeness` of soft tokens [N, D] to the embeddings of a text's tokens, before any layer: f32 [N]."""
    return likeness(soft_tokens, table_rows(model.params, model.processor.tokenizer.encode(f" {text.strip()}")))


def hidden_similarity(trace: Trace, word: Word) -> np.ndarray:
    """`likeness` of the patches to some tokens of the same pass, between all layers: f32 [L + 1, I * N].

    Entry l is of what leaves layer l, the layers counted from 1; entry 0 of what enters the first. `word` is from
    `find_in_prompt`, or counted from the first position in another way.
    """
    layers = (np.asarray(hidden, np.float32) for hidden in trace.hidden)
    seen = trace.patches >= 0
    return np.stack([likeness(hidden[seen], hidden[word.start : word.stop]) for hidden in layers])


def patch_similarity(trace: Trace) -> np.ndarray:
    """How alike patches are to each other, the mean over the upper half of the layers: f32 [I * N, I * N].

    Of each layer it is the cosine of what is left of their directions without the mean one.
    """
    num_layers = len(trace.hidden) - 1
    seen = trace.patches >= 0
    total = np.zeros((seen.sum(), seen.sum()), np.float32)
    upper = upper_layers(num_layers)
    for hidden in trace.hidden[-upper:]:
        directions = _directions(np.asarray(hidden, np.float32)[seen])
        different = _directions(directions - directions.mean(axis=0))
        total += different @ different.T / upper
    return total


def attention(trace: Trace, renormalise: bool = False) -> np.ndarray:
    """How much the position that gives an answer's token looks at each patch: f32 [L, heads, n, I * N].

    With `renormalise` the patches of a token sum to one; else to what the text leaves them. Both are zeros where a
    sliding window has moved on from the picture.
    """
    weights = trace.attention[..., trace.patches >= 0]
    if not renormalise:
        return weights
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def upper_half(maps: np.ndarray, num_layers: int) -> np.ndarray:
    """The mean over the upper half of the layers of maps [L, ...] or, of states between layers, [L + 1, ...].

    There a decoder has made up its mind what is where; on the shipped model they point best, see `pointing`.
    """
    return maps[-upper_layers(num_layers) :].mean(axis=0)


def upper_layers(num_layers: int) -> int:
    """How many layers are the upper half."""
    return (num_layers + 1) // 2


def of_layer(maps: np.ndarray, num_layers: int, layer: int | None) -> np.ndarray:
    """One layer's of maps [L, ...], or of states between layers [L + 1, ...] that which leaves it; None: `upper_half`.

    Layers are counted from 0.
    """
    return upper_half(maps, num_layers) if layer is None else maps[len(maps) - num_layers + layer]


def of_head(weights: np.ndarray, head: int | None) -> np.ndarray:
    """One head's, counted from 0, of weights [L, heads, ...], or the mean of all: [L, ...]."""
    return weights.mean(axis=1) if head is None else weights[:, head]


def layer_name(layer: int | None) -> str:
    """What `of_layer` chose, for people, who count from 1."""
    return "mean of the upper layers" if layer is None else f"layer {layer + 1}"


def head_name(head: int | None) -> str:
    """What `of_head` chose, for people."""
    return "mean of the heads" if head is None else f"head {head + 1}"


def find_in_prompt(trace: Trace, tokenizer: Tokenizer, text: str) -> Word:
    """Where a text stands in the prompt of a trace, in positions of the whole sequence; PromptError if nowhere."""
    start = int(np.flatnonzero(trace.patches >= 0)[-1]) + 1
    found = find(tokenizer, trace.tokens[start : trace.prefix_length].tolist(), text)
    return Word(found.text, start + found.start, start + found.stop)


def table_rows(params: Params, ids: list[int]) -> np.ndarray:
    """Rows f32 [M, D] of the token table; PromptError without ids."""
    if not ids:
        raise PromptError("there is no text to compare with: give a word")
    weight = params["language_model"]["embed_tokens"]["weight"]
    return np.asarray(rows_of(weight, jnp.asarray(ids)), np.float32)


def _directions(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., D] scaled to length one; zeros stay zeros."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
