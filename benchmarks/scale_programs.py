"""The programs that scale.py compiles, as shapes on a mesh, and the least that a chip has to do for each.

Axes: B rows, I images, N soft tokens of an image, T tokens of a row, A answer positions, S cache slots.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax import ops
from paligemma_jax.checkpoints import expected_shapes
from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.engine import sampling, steps
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.sharding import Layout
from paligemma_jax.training.loss import suffix_loss
from paligemma_jax.training.optimizer import Recipe, make_optimizer
from paligemma_jax.training.step import init_state, make_step
from paligemma_jax.training.trainable import join

PROMPT, ANSWER = 32, 96  # text tokens of a prompt, and cache slots for its answer
ROWS = 8  # that are answered at once
TEXT, NUM_ANSWERS = 128, 64  # tokens of prefix and suffix of an example, and those of its suffix
EXAMPLES_PER_CHIP = {224: 4, 448: 2, 896: 1}
RANK = 16  # of LoRA, on all projections of the decoder
_LOC_START = 256000  # id of the first location token in the released vocabularies

PROGRAMS = ("prompt", "decode", "lora", "full")


@dataclasses.dataclass(frozen=True)
class Work:
    """A program, and the least work that it is.

    function: of `jax.jit`.
    args: shapes with shardings.
    unit: what it makes, "tokens" or "examples".
    count: how many of them.
    flops: of all chips together: matmuls alone, those that remat computes again included.
    read_bytes: that each chip has to read from its memory, or write to it.
    """

    function: Any
    args: tuple[Any, ...]
    unit: str
    count: int
    flops: float
    read_bytes: float


def build(variant: str, program: str, layout: Layout, target: ops.Target) -> Work:
    """A program of a released variant on a mesh."""
    config = VARIANTS[variant]
    if program in ("prompt", "decode"):
        return _inference(config, program, layout, target)
    return _training(config, program, layout)


def _parameters(config: PaliGemmaConfig, dtype: Any) -> Any:
    shapes = expected_shapes(config)
    return unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}, sep="/")


def _inference(config: PaliGemmaConfig, program: str, layout: Layout, target: ops.Target) -> Work:
    params = _parameters(config, jnp.bfloat16)
    if layout.mesh.size == 1:
        params = ops.prepare(params, target)  # as `load` does for one device
    num_tokens = config.vision.num_tokens + PROMPT
    rows = ROWS if program == "decode" else min(ROWS, steps.most_at_once(num_tokens))
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, num_tokens), (rows,)))
    side = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)
    options = [GenerateOptions(max_new_tokens=ANSWER)] * rows
    row_options = jax.eval_shape(
        lambda: sampling.row_options(options, sampling.row_keys([0] * rows, range(rows)), None)
    )
    step = sampling.step_config(config, _LOC_START, options, constrained=False)

    @jax.jit
    def prompt(params: Any, pixels: Any, ids: Any, slots: Any, prefix_length: Any, length: Any, options: Any) -> Any:
        soft_tokens = steps.run(params, pixels, config=config, method="embed_image")
        inputs = steps.Inputs(soft_tokens, ids, slots, prefix_length, length)
        static = {"config": step, "num_tokens": ANSWER, "num_slots": num_tokens + ANSWER}
        return steps.prefill(params, inputs, options, **static)

    args = (params, pixels, ids, ids, lengths, lengths, row_options)
    flops = _forward(config, rows, num_tokens, 1)
    weights = _shard_bytes(layout, params)
    if program == "decode":
        state = jax.eval_shape(prompt, *args)
        decode = functools.partial(steps.decode, config=step, num_steps=1)
        decode = jax.jit(decode, donate_argnums=1)
        table = {"language_model": params["language_model"]}
        read = _shard_bytes(layout, table) + _shard_bytes(layout, state.cache)
        flops = _decoder(config, rows, 1, 1, num_tokens + ANSWER)
        return _work(layout, decode, (params, state), "tokens", rows, flops, read)
    return _work(layout, prompt, args, "examples", rows, flops, weights)


def _training(config: PaliGemmaConfig, program: str, layout: Layout) -> Work:
    params = _parameters(config, jnp.bfloat16)
    masters = _parameters(config, jnp.float32)
    trained, frozen = (masters, None) if program == "full" else (_adapters(params), params)
    num_tokens, side = config.vision.num_tokens + TEXT, config.vision.image_size
    rows = EXAMPLES_PER_CHIP[side] * layout.mesh.size
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, num_tokens), (rows,)))
    batch = {
        "pixels": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32),
        **{"tokens": ids, "image_slots": ids, "prefix_length": lengths, "length": lengths},
    }
    loss = functools.partial(suffix_loss, PaliGemma(config, remat=True), 0.0, NUM_ANSWERS)
    optimizer = make_optimizer(Recipe(), 1000)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), trained)
    step = make_step(loss, optimizer, frozen, functools.partial(join, dtype=jnp.bfloat16))
    update = jax.jit(step.update, donate_argnums=0)  # without the options for this process's own compiler
    forward = _forward(config, rows, num_tokens, NUM_ANSWERS)
    decoder = _decoder(config, rows, num_tokens, NUM_ANSWERS, num_tokens)
    # A gradient is twice a forward pass, remat one more. Of LoRA it is once, for activations, and for the decoder only.
    flops = 4 * forward if program == "full" else (forward - decoder) + 3 * decoder
    read = 2 * _shard_bytes(layout, state) + (_shard_bytes(layout, frozen) if frozen else 0)
    return _work(layout, update, (state, frozen, batch), "examples", rows, flops, read)


def _work(layout: Layout, function: Any, args: Any, unit: str, count: int, flops: float, read: float) -> Work:
    return Work(function, layout.shapes(args), unit, count, flops, read)


def _adapters(params: Any) -> Any:
    flat = flatten_dict(params, sep="/")
    found = {}
    for path, leaf in flat.items():
        if path.startswith("language_model/layers_") and path.endswith("_proj/weight"):
            num_outputs, width = leaf.shape
            found[f"{path}/down"] = jax.ShapeDtypeStruct((RANK, width), jnp.float32)
            found[f"{path}/up"] = jax.ShapeDtypeStruct((num_outputs, RANK), jnp.float32)
    return unflatten_dict(found, sep="/")


def _shard_bytes(layout: Layout, tree: Any) -> float:
    """Bytes of the part of a tree that each device has."""

    def size(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, layout.shardings(tree))))


def _forward(config: PaliGemmaConfig, rows: int, num_tokens: int, num_logits: int) -> float:
    """Operations of the matmuls of a forward pass, a picture for each row."""
    vision, count = config.vision, config.vision.num_tokens
    layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    patch = 3 * vision.patch_size**2 * vision.width
    weights = vision.num_layers * layer + patch + vision.width * config.text.width
    attention = vision.num_layers * 2 * count * vision.width
    return 2.0 * rows * count * (weights + attention) + _decoder(config, rows, num_tokens, num_logits, num_tokens)


def _decoder(config: PaliGemmaConfig, rows: int, num_tokens: int, num_logits: int, num_keys: int) -> float:
    text = config.text
    heads = text.num_heads * text.head_dim
    layer = text.width * (2 * heads + 2 * text.num_kv_heads * text.head_dim + 3 * text.mlp_dim)
    attention = 2 * num_keys * heads
    logits = num_logits * text.width * text.vocab_size
    return 2.0 * rows * (num_tokens * text.num_layers * (layer + attention) + logits)
