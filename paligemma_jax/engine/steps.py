"""Prefill and decode: the compiled functions that every way of generating drives.

`prefill(params, inputs, options) -> DecodeState`, `insert(state, slots, prefix) -> DecodeState` (in `engine.state`) and
`decode(params, state) -> DecodeState`. A whole batch, a stream and a server's slots run the same programs. Shapes come
in few sizes, so that a second prompt compiles nothing.

Axes: I images, N soft tokens of an image, B rows, T prompt tokens, S cache slots, D decoder width, M answer tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax import ops
from paligemma_jax.buckets import power_of_two
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine.sampling import RowOptions, StepConfig
from paligemma_jax.engine.state import DecodeState, fresh, say
from paligemma_jax.models.paligemma import PaliGemma, matmul_precision
from paligemma_jax.processing.processor import Batch

Params = dict[str, Any]

_MAX_IMAGES = 16  # that the vision tower takes at once
_MAX_SCORES = 2**24  # attention scores of a head: a sequence with the 4096 tokens of an image at 896 px runs alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A `Batch` whose images became soft tokens."""

    soft_tokens: jax.Array  # [I, N, D]
    tokens: jax.Array  # i32 [B, T]
    image_slots: jax.Array  # i32 [B, T]
    prefix_length: jax.Array  # i32 [B]
    length: jax.Array  # i32 [B]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The arguments of the network's methods for whole sequences."""
        return self.soft_tokens, self.tokens, self.image_slots, self.prefix_length, self.length


def apply(params: Params, config: PaliGemmaConfig, method: str, *args: Any) -> Any:
    """A method of the network; matmuls with float32 weights are true float32 on every platform."""
    with jax.default_matmul_precision(matmul_precision(params)):
        return PaliGemma(config).apply({"params": params}, *args, method=method)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(params: Params, x: jax.Array, *, config: PaliGemmaConfig, method: str) -> jax.Array:
    """One stage of the image side: `embed_image` or `encode_image` of pixels [I, S, S, 3], `project` of features."""
    return apply(params, config, method, x)


def first_logits(params: Params, config: PaliGemmaConfig, inputs: Inputs) -> tuple[jax.Array, Any]:
    """Run whole prompts: logits f32 [B, V] after each row's last token, and the keys and values of all."""
    hidden, key_values = apply(params, config, "prefill", *inputs.arrays, (inputs.length - 1)[:, None])
    return ops.materialize(apply(params, config, "logits", hidden[:, 0])), key_values


def next_logits(
    params: Params, config: PaliGemmaConfig, tokens: jax.Array, positions: jax.Array, state: DecodeState
) -> tuple[jax.Array, Any]:
    """Run n tokens [B, n] per row at their positions [B, n]: logits f32 [B, n, V] after each, and the cache."""
    logits, cache = apply(params, config, "decode", tokens, positions, state.prefix_length, state.cache)
    return ops.materialize(logits), cache


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "num_slots"))
def prefill(
    params: Params,
    inputs: Inputs,
    options: RowOptions,
    *,
    config: StepConfig,
    num_tokens: int,
    num_slots: int | None = None,
) -> DecodeState:
    """Run prompts and choose the first token of each.

    Args:
      inputs, options: of the rows.
      num_tokens: M of the state.
      num_slots: S of the state; by default as many as the prompts take, for a prefix that is to be inserted.
    """
    logits, cache = first_logits(params, config.model, inputs)
    cache = cache if num_slots is None else ops.pad_cache(cache, num_slots)
    return say(fresh(cache, inputs.prefix_length, options, config, num_tokens), logits, config)


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames="state")
def decode(params: Params, state: DecodeState, *, config: StepConfig, num_steps: int) -> DecodeState:
    """Lengthen each answer by up to `num_steps` tokens; a row that is done stays as it is."""

    def step(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        return decode_step(params, state, config)[0], None

    return lax.scan(step, state, None, length=num_steps)[0]


def decode_step(params: Params, state: DecodeState, config: StepConfig) -> tuple[DecodeState, jax.Array]:
    """Lengthen each answer by a token; also the logits f32 [B, V] that it is chosen from."""
    logits, cache = next_logits(params, config.model, state.last, state.next_position, state)
    return say(dataclasses.replace(state, cache=cache), logits[:, 0], config), logits[:, 0]


def most_at_once(num_tokens: int) -> int:
    """How many sequences of so many tokens may attend at once, so that their float32 scores fit in memory; 2**n."""
    return 1 << max(1, _MAX_SCORES // num_tokens**2).bit_length() - 1


def image_batches(count: int, num_tokens: int) -> list[int]:
    """How many images the vision tower takes, call after call: powers of two, so that few programs never pad."""
    most = min(_MAX_IMAGES, most_at_once(num_tokens))
    sizes = []
    while count:
        sizes.append(min(most, 1 << count.bit_length() - 1))
        count -= sizes[-1]
    return sizes


def select_rows(batch: Batch, soft_tokens: jax.Array, rows: range) -> Inputs:
    """Some rows of a batch and the soft tokens [I, N, D] of just the images they use.

    Rows and images are padded to a power of two with copies; results of rows beyond len(rows) are to be dropped.
    """
    num_tokens = soft_tokens.shape[1]
    index = np.asarray(rows)[padded_rows(len(rows))]
    slots = batch.image_slots[index]
    images = np.unique(slots[slots >= 0] // num_tokens)
    local = np.searchsorted(images, slots // num_tokens) * num_tokens + slots % num_tokens
    images = images[padded_rows(len(images))]
    if isinstance(soft_tokens, jax.ShapeDtypeStruct):
        soft_tokens = jax.ShapeDtypeStruct((len(images), *soft_tokens.shape[1:]), soft_tokens.dtype)
    elif not np.array_equal(images, np.arange(len(soft_tokens))):
        soft_tokens = jnp.take(soft_tokens, images, axis=0)
    arrays = (batch.tokens[index], np.where(slots >= 0, local, -1), batch.prefix_length[index], batch.length[index])
    return Inputs(soft_tokens, *(np.asarray(x, np.int32) for x in arrays))


def padded_rows(count: int) -> np.ndarray:
    """0 .. count - 1, the last repeated up to a power of two."""
    return np.minimum(np.arange(power_of_two(count)), count - 1)
