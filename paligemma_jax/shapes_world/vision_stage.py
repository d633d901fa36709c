"""Teach an image encoder what each patch shows before it has to speak.

From the language loss alone a small model ignores the picture for a long time. Here a throw-away linear head names, for
every patch, the shape, the colour and the box of the thing under it, and where that thing stands among its like: how
many there are, and which of them it is from the left. The patch at a thing's centre also names its mask codes. Counting
and order are what answers need and what a small decoder is slow to find; the encoder, which sees all patches at once,
learns them in minutes.

Axes: B pictures, P patches, K places for shapes, R relations, C mask codes, D encoder width.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from paligemma_jax.config import VisionConfig
from paligemma_jax.models.siglip import SigLIP
from paligemma_jax.processing.tokenizer import SEG_TOKENS
from paligemma_jax.shapes_world.pool import epoch_rows, take
from paligemma_jax.shapes_world.scenes import COLORS, MAX_OBJECTS, SHAPES
from paligemma_jax.tasks.detection import NUM_CODES
from paligemma_jax.training.loss import mean_where

_SEEN = 0.03  # a patch belongs to a shape that covers at least this share of it
_UNSEEN = 0.005  # and to the background when every shape covers less than this; between the two nothing is asked

RELATIONS = ("any", "same shape", "same color", "same shape and color")  # what counts as being like a thing

_OUTPUTS = {  # of every patch; the last shape and colour are the background
    "shape": (len(SHAPES) + 1,),
    "color": (len(COLORS) + 1,),
    "box": (4,),
    "count": (len(RELATIONS), MAX_OBJECTS),
    "rank": (len(RELATIONS), MAX_OBJECTS),
}


class DenseHead(nn.Module):
    """Patch features [B, P, D] to one output [B, P, ...] for each of `_OUTPUTS`: boxes, and logits of all else.

    With the `centre` [B, K] of each thing, the number of a patch, also the logits of its `codes` [B, K, C, 128].
    """

    @nn.compact
    def __call__(self, x: jax.Array, centre: jax.Array) -> dict[str, jax.Array]:
        sizes = [math.prod(shape) for shape in _OUTPUTS.values()]
        parts = jnp.split(nn.Dense(sum(sizes), name="out")(x), np.cumsum(sizes)[:-1], axis=-1)
        named = zip(_OUTPUTS.items(), parts, strict=True)
        out = {name: part.reshape(*x.shape[:-1], *shape) for (name, shape), part in named}
        at_centre = jnp.take_along_axis(x, centre[:, :, None], axis=1)
        codes = nn.Dense(NUM_CODES * len(SEG_TOKENS), name="codes")(at_centre)
        return {**out, "codes": codes.reshape(*centre.shape, NUM_CODES, len(SEG_TOKENS))}


class DenseModel(nn.Module):
    config: VisionConfig

    def setup(self):
        self.vision_tower = SigLIP(self.config)
        self.head = DenseHead()

    def __call__(self, pixels: jax.Array, centre: jax.Array) -> dict[str, jax.Array]:
        return self.head(self.vision_tower(pixels), centre)


@dataclasses.dataclass(frozen=True)
class DenseBatches:
    """Batches with dense targets, a function of the step: pictures of a pool, half of them mirrored.

    `codes` i32 [2, N, K, C] are the mask codes of every shape, as drawn and mirrored.
    """

    pool: dict[str, np.ndarray]
    codes: np.ndarray
    batch_size: int
    seed: int = 0

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        rows = epoch_rows(len(self.pool["pixels"]), self.batch_size, step, self.seed)
        mirrored = np.random.default_rng((self.seed, step)).random(self.batch_size) < 0.5
        record = take(self.pool, rows, mirrored)
        return {"pixels": record["pixels"], **dense_targets(record, self.codes[mirrored.astype(int), rows])}


def dense_targets(record: dict[str, np.ndarray], codes: np.ndarray) -> dict[str, np.ndarray]:
    """What each patch [B, P] shows: `seen` where there is a thing, `asked` where it is clear whether there is one.

    Of the thing under it: `shape`, `color`, `box` [..., 4], and by relation [..., R] how many others are like it
    (`count`) and how many of those are left of it (`rank`). Of each thing: the patch at its `centre` [B, K], and its
    `codes` [B, K, C], -1 where there is none.
    """
    owner = record["coverage"].argmax(axis=1)  # [B, P]
    most = record["coverage"].max(axis=1) / 255
    seen = most >= _SEEN
    place = np.arange(len(owner))[:, None]
    count, rank = standing(record)
    y0, x0, y1, x1 = np.moveaxis(record["box"], -1, 0)
    grid = round(owner.shape[1] ** 0.5)
    row, column = ((middle * grid / 2).astype(np.int32) for middle in (y0 + y1, x0 + x1))
    return {
        "shape": np.where(seen, record["shape"][place, owner], len(SHAPES)).astype(np.int32),
        "color": np.where(seen, record["color"][place, owner], len(COLORS)).astype(np.int32),
        "box": record["box"][place, owner],
        "count": count[place, owner],
        "rank": rank[place, owner],
        "centre": row * grid + column,
        "codes": np.where(record["shape"][..., None] >= 0, codes.astype(np.int32), -1),
        "seen": seen,
        "asked": seen | (most < _UNSEEN),
    }


def standing(record: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How many others are like each thing, and how many of those are left of it: two of u8 [B, K, R]."""
    shape, color, left = record["shape"], record["color"], record["box"][..., 1]
    there = shape >= 0
    both = there[:, :, None] & there[:, None, :]
    same_shape = both & (shape[:, :, None] == shape[:, None, :])
    same_color = both & (color[:, :, None] == color[:, None, :])
    like = np.stack([both, same_shape, same_color, same_shape & same_color], axis=-1)  # [B, K, K, R]
    like &= ~np.eye(shape.shape[1], dtype=bool)[:, :, None]
    before = (left[:, None, :] < left[:, :, None])[..., None]
    return like.sum(axis=2, dtype=np.uint8), (like & before).sum(axis=2, dtype=np.uint8)


def normalise(pixels: jax.Array) -> jax.Array:
    """Bytes to float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def smooth_positions(num_positions: int, width: int) -> np.ndarray:
    """Position embeddings [P, D] to start from: sines and cosines of row and column, so that near patches are alike."""
    grid = round(num_positions**0.5)
    row, column = np.divmod(np.arange(num_positions), grid)
    count = -(-width // 4)
    frequency = np.pi / grid * np.geomspace(0.5, grid / 2, count)
    waves = [wave(place[:, None] * frequency) for place in (row, column) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1)[:, :width].astype(np.float32)


def warm_start(params: dict) -> dict:
    """Parameters of a `DenseModel` whose attention starts out looking at like patches: near ones of like colour.

    Keys start equal to queries (after "Mimetic initialization of self-attention layers", arXiv 2305.09828) and
    positions as waves; from random ones a small encoder is slow to find that neighbours matter.
    """
    tower = dict(params["vision_tower"])
    positions = tower["position_embedding"]["weight"]
    tower["position_embedding"] = {"weight": jnp.asarray(smooth_positions(*positions.shape))}
    for name, layer in tower.items():
        if name.startswith("layers_"):
            attention = layer["self_attn"]
            tower[name] = {**layer, "self_attn": {**attention, "k_proj": jax.tree.map(jnp.copy, attention["q_proj"])}}
    return {**params, "vision_tower": tower}


def dense_loss(model: DenseModel, params: dict, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of the encoder with its head on a batch of `DenseBatches`."""
    out = model.apply({"params": params}, normalise(batch["pixels"]), batch["centre"])
    return dense_losses(out, batch)


def dense_losses(out: dict[str, jax.Array], targets: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of shape and colour over the asked patches, of the rest and the boxes' distance over the seen."""
    asked, seen = targets["asked"], targets["seen"]
    there = targets["codes"][..., 0] >= 0

    def mean(values: jax.Array, where: jax.Array) -> jax.Array:
        return mean_where(jnp.mean(values.reshape(*where.shape, -1), axis=-1), where)

    def entropy(name: str, where: jax.Array) -> jax.Array:
        labels = jnp.maximum(targets[name].astype(jnp.int32), 0)
        return mean(optax.softmax_cross_entropy_with_integer_labels(out[name], labels), where)

    def accuracy(name: str, where: jax.Array) -> jax.Array:
        return mean((jnp.argmax(out[name], -1) == targets[name]).astype(jnp.float32), where)

    off = jnp.abs(out["box"] - targets["box"])
    # A small shape needs a finer box: what counts is the error over its own side.
    height, width = targets["box"][..., 2] - targets["box"][..., 0], targets["box"][..., 3] - targets["box"][..., 1]
    relative = off / (jnp.stack([height, width, height, width], -1) + 0.1)
    metrics = {f"{name}_acc": accuracy(name, seen) for name in ("shape", "color", "count", "rank")}
    metrics |= {"codes_acc": accuracy("codes", there), "box_error": mean(off, seen)}
    loss = entropy("shape", asked) + 0.5 * entropy("color", asked) + mean(relative, seen)
    loss = loss + entropy("count", seen) + entropy("rank", seen) + 0.5 * entropy("codes", there)
    return loss, metrics
