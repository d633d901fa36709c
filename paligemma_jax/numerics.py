"""Numbers that are not finite: noticed with every answer, and followed to the layers where they arise.

What is looked at while answering is the log-probability of each chosen token, which is on the host anyway: it is NaN as
soon as one logit is NaN or infinite. The search for the place runs only once something was found.

Axes: I images, N soft tokens of an image, B rows, T tokens, L layers, D decoder width.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine import forward, generate, steps
from paligemma_jax.engine.generate import Generation, Group, Progress
from paligemma_jax.engine.runner import Call
from paligemma_jax.errors import NumericsError

ALL_FINITE = "give a lower learning_rate"  # what is said where only a gradient is not finite
_FAMILIES = {
    "vision_tower": "the image encoder",
    "multi_modal_projector": "the projector",
    "embed_tokens": "the token embeddings",
    "norm": "the final norm",
    "lm_head": "the output head",
}


def answers(call: Call, generation: Generation, group: Group) -> Iterator[Progress]:
    """The answers of a group as they grow (`engine.generate.answers`); NumericsError at the first that is NaN."""
    for progress in generate.answers(call, group):
        finite = np.isfinite(progress.scores.logprobs).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            said = progress.tokens[row, : progress.step[row] - 1]  # the last one is what was chosen without reason
            inputs, pixels = one_row(group.inputs, row, said), generation.batch.pixels
            raise NumericsError(explain(generation.config, call.params, inputs, pixels))
        yield progress


def require_finite(values: Any, config: PaliGemmaConfig, params: steps.Params, inputs: steps.Inputs, row: int) -> None:
    """Raise NumericsError unless these results of a row, which the host holds, are finite."""
    if not np.isfinite(values).all():
        raise NumericsError(explain(config, params, one_row(inputs, row)))


def require_finite_images(embedded: jax.Array, config: PaliGemmaConfig, params: steps.Params, pixels: Any) -> None:
    """Raise NumericsError unless images that were embedded, [I, N, D] or [I, N, E], are finite."""
    if not np.isfinite(np.asarray(embedded)).all():
        place = _damaged(params) or _image_side(config, params, pixels)
        raise NumericsError(_message(place, params))


def one_row(inputs: steps.Inputs, row: int, said: np.ndarray | tuple[int, ...] = ()) -> steps.Inputs:
    """One row of a batch without padding, followed by the tokens of its answer so far."""
    length, said = int(inputs.length[row]), np.asarray(said, np.int32)
    return dataclasses.replace(
        inputs,
        tokens=np.concatenate([inputs.tokens[row, :length], said])[None],
        image_slots=np.concatenate([inputs.image_slots[row, :length], np.full_like(said, -1)])[None],
        prefix_length=np.asarray(inputs.prefix_length[row : row + 1]),
        length=np.array([length + len(said)], np.int32),
    )


def explain(
    config: PaliGemmaConfig, params: steps.Params, inputs: steps.Inputs, pixels: np.ndarray | None = None
) -> str:
    """Where in a pass over one row numbers stop being finite, and what to do.

    Args:
      inputs: of the row.
      pixels: of the images that the soft tokens are of, if they are known: [I, S, S, 3].
    """
    place = _damaged(params)
    if place is None and not np.isfinite(np.asarray(inputs.soft_tokens)).all():
        given = pixels is None or not len(pixels)
        place = "the embeddings of its images" if given else _image_side(config, params, pixels)
    if place is None:
        hidden, _, _ = forward.trace(params, inputs, config=config, num_positions=1)
        finite = jnp.isfinite(hidden).all(axis=(1, 2, 3)).tolist()  # [L + 1], what enters each layer and leaves all
        layer = finite.index(False) if not all(finite) else len(finite)
        inside = f"decoder layer {layer - 1}" if layer else _FAMILIES["embed_tokens"]
        place = inside if layer < len(finite) else "the output head"
    return _message(place, params)


def explain_batch(config: PaliGemmaConfig, params: steps.Params, batch: dict[str, np.ndarray]) -> str:
    """The same for a training batch: its first row whose suffix has no finite probability.

    Where all have one, the gradient alone was not finite: a lower learning rate helps.
    """
    soft_tokens = steps.run(params, batch["pixels"], config=config, method="embed_image")
    rows = (batch[name] for name in ("tokens", "image_slots", "prefix_length", "length"))
    inputs = steps.Inputs(soft_tokens, *rows)
    lengths = inputs.length - inputs.prefix_length
    logprobs = forward.suffix_logprobs(params, inputs, config=config, num_positions=int(lengths.max()))
    for row, (values, length) in enumerate(zip(np.asarray(logprobs), lengths, strict=True)):
        if not np.isfinite(values[:length]).all():
            return explain(config, params, one_row(inputs, row), batch["pixels"])
    half = params["language_model"]["norm"]["weight"].dtype == jnp.float16
    return ALL_FINITE + ", or dtype=bfloat16: float16 ends at 65504" * half


def _damaged(params: steps.Params) -> str | None:
    """The family of the first parameter that is not finite, and its name."""
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(value.dtype, jnp.floating) and not jnp.isfinite(value).all():
            names = [str(getattr(entry, "key", getattr(entry, "name", entry))).strip(".") for entry in path]
            return f"{_family(names)} ({'.'.join(names)} itself holds NaN or infinity)"
    return None


def _family(names: list[str]) -> str:
    top = names[0] if names[0] in _FAMILIES else names[1]
    return _FAMILIES.get(top) or f"decoder layer {top.removeprefix('layers_')}"


def _image_side(config: PaliGemmaConfig, params: steps.Params, pixels: np.ndarray) -> str:
    features = [steps.run(params, image[None], config=config, method="encode_image") for image in pixels]
    finite = all(np.isfinite(np.asarray(x)).all() for x in features)
    return _FAMILIES["multi_modal_projector" if finite else "vision_tower"]


def _message(place: str, params: steps.Params) -> str:
    dtype = params["language_model"]["norm"]["weight"].dtype
    remedy = "the weights are damaged, or not of this model: convert or download them again (bfloat16 or float32)"
    if dtype == jnp.float16:
        remedy = "float16 ends at 65504: use dtype=bfloat16; if that does not help, the weights are damaged"
    return f"the model's numbers are NaN or infinite, first in {place}: {remedy}"
