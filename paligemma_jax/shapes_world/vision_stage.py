"""The vision stage: pretrains the image encoder with dense labels before the whole model is trained.

From the language loss alone a small model ignores the image for a long time. Here an auxiliary linear head predicts,
for every patch, the shape, the colour and the box of the object under it, how many other objects are similar to it, and
its rank among them from the left. At the patch of an object's centre it also predicts the object's mask codes. Counting
and order are what answers need and what a small decoder is slow to find; the encoder, which sees all patches at once,
learns them in minutes. The head is dropped after training.

Axes: B images, P patches, K object slots, R relations, C mask codes, D encoder width.
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

_FOREGROUND = 0.03  # a patch is foreground when a shape covers at least this share of it
_BACKGROUND = 0.005  # and background when every shape covers less than this; between the two nothing is supervised

RELATIONS = ("any", "same shape", "same color", "same shape and color")  # when an object counts as similar to another

_OUTPUTS = {  # of every patch; the last shape and colour are the background
    "shape": (len(SHAPES) + 1,),
    "color": (len(COLORS) + 1,),
    "box": (4,),
    "count": (len(RELATIONS), MAX_OBJECTS),
    "rank": (len(RELATIONS), MAX_OBJECTS),
}


class DenseHead(nn.Module):
    """Linear heads over patch features [B, P, D]: one output [B, P, ...] for each of `_OUTPUTS`, boxes and else logits.

    `centre` [B, K] is the index of the patch at each object's centre; from it come the logits of the object's mask
    `codes` [B, K, C, 128].
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
    """The image encoder with its dense head."""

    config: VisionConfig

    def setup(self):
        self.vision_tower = SigLIP(self.config)
        self.head = DenseHead()

    def __call__(self, pixels: jax.Array, centre: jax.Array) -> dict[str, jax.Array]:
        return self.head(self.vision_tower(pixels), centre)


@dataclasses.dataclass(frozen=True)
class DenseBatches:
    """Batches with dense labels as a function of the step: images of a pool, half of them mirrored.

    `codes` u8 [V, N, K, C] are the mask codes of every shape: as drawn, mirrored, and perhaps in more views.
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
    """Labels of each patch [B, P] and of each object [B, K], from records of a pool.

    Per patch: `foreground` where an object covers it, `supervised` where it is clearly foreground or background; of the
    object that covers it most, `shape`, `color`, `box` [..., 4], and by relation [..., R] the `count` of other similar
    objects and its `rank`, how many of those are left of it. Per object: `centre`, the index of the patch at the centre
    of its box, and its mask `codes` [B, K, C], -1 where the slot is empty.
    """
    owner = record["coverage"].argmax(axis=1)  # [B, P]
    most = record["coverage"].max(axis=1) / 255
    foreground = most >= _FOREGROUND
    row_index = np.arange(len(owner))[:, None]
    count, rank = count_and_rank(record)
    y0, x0, y1, x1 = np.moveaxis(record["box"], -1, 0)
    grid = round(owner.shape[1] ** 0.5)
    row, column = ((middle * grid / 2).astype(np.int32) for middle in (y0 + y1, x0 + x1))
    return {
        "shape": np.where(foreground, record["shape"][row_index, owner], len(SHAPES)).astype(np.int32),
        "color": np.where(foreground, record["color"][row_index, owner], len(COLORS)).astype(np.int32),
        "box": record["box"][row_index, owner],
        "count": count[row_index, owner],
        "rank": rank[row_index, owner],
        "centre": row * grid + column,
        "codes": np.where(record["shape"][..., None] >= 0, codes.astype(np.int32), -1),
        "foreground": foreground,
        "supervised": foreground | (most < _BACKGROUND),
    }


def count_and_rank(record: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How many other objects are similar to each by relation, and how many of those are left of it: u8 [B, K, R]."""
    shape, color, left = record["shape"], record["color"], record["box"][..., 1]
    exists = shape >= 0
    both = exists[:, :, None] & exists[:, None, :]
    same_shape = both & (shape[:, :, None] == shape[:, None, :])
    same_color = both & (color[:, :, None] == color[:, None, :])
    similar = np.stack([both, same_shape, same_color, same_shape & same_color], axis=-1)  # [B, K, K, R]
    similar &= ~np.eye(shape.shape[1], dtype=bool)[:, :, None]
    before = (left[:, None, :] < left[:, :, None])[..., None]
    return similar.sum(axis=2, dtype=np.uint8), (similar & before).sum(axis=2, dtype=np.uint8)


def normalize(pixels: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def sinusoidal_positions(num_positions: int, width: int) -> np.ndarray:
    """Initial position embeddings [P, D]: sines and cosines of row and column, so that near patches are similar."""
    grid = round(num_positions**0.5)
    row, column = np.divmod(np.arange(num_positions), grid)
    count = -(-width // 4)
    frequency = np.pi / grid * np.geomspace(0.5, grid / 2, count)
    waves = [wave(index[:, None] * frequency) for index in (row, column) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1)[:, :width].astype(np.float32)


def mimetic_init(params: dict) -> dict:
    """The parameters of a `DenseModel` with key projections equal to query projections and sinusoidal positions.

    So attention starts on similar patches, near ones of similar colour; from random parameters a small encoder is slow
    to find that neighbours matter. After "Mimetic initialization of self-attention layers" (arXiv 2305.09828).
    """
    tower = dict(params["vision_tower"])
    positions = tower["position_embedding"]["weight"]
    tower["position_embedding"] = {"weight": jnp.asarray(sinusoidal_positions(*positions.shape))}
    for name, layer in tower.items():
        if name.startswith("layers_"):
            attention = layer["self_attn"]
            tower[name] = {**layer, "self_attn": {**attention, "k_proj": jax.tree.map(jnp.copy, attention["q_proj"])}}
    return {**params, "vision_tower": tower}


def dense_loss(model: DenseModel, params: dict, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of the encoder with its head on a batch of `DenseBatches`."""
    out = model.apply({"params": params}, normalize(batch["pixels"]), batch["centre"])
    return dense_losses(out, batch)


def dense_losses(out: dict[str, jax.Array], targets: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of the head's outputs.

    Cross-entropy of shape and colour over the supervised patches, of count and rank over the foreground, of the codes
    over the objects; and the L1 distance of the boxes over the foreground, relative to their sides.
    """
    supervised, foreground = targets["supervised"], targets["foreground"]
    exists = targets["codes"][..., 0] >= 0

    def mean(values: jax.Array, where: jax.Array) -> jax.Array:
        return mean_where(jnp.mean(values.reshape(*where.shape, -1), axis=-1), where)

    def entropy(name: str, where: jax.Array) -> jax.Array:
        labels = jnp.maximum(targets[name].astype(jnp.int32), 0)
        return mean(optax.softmax_cross_entropy_with_integer_labels(out[name], labels), where)

    def accuracy(name: str, where: jax.Array) -> jax.Array:
        return mean((jnp.argmax(out[name], -1) == targets[name]).astype(jnp.float32), where)

    distance = jnp.abs(out["box"] - targets["box"])
    # A small shape needs a finer box: what counts is the error over its own side.
    height, width = targets["box"][..., 2] - targets["box"][..., 0], targets["box"][..., 3] - targets["box"][..., 1]
    relative = distance / (jnp.stack([height, width, height, width], -1) + 0.1)
    metrics = {f"{name}_acc": accuracy(name, foreground) for name in ("shape", "color", "count", "rank")}
    metrics |= {"codes_acc": accuracy("codes", exists), "box_error": mean(distance, foreground)}
    loss = entropy("shape", supervised) + 0.5 * entropy("color", supervised) + mean(relative, foreground)
    loss = loss + entropy("count", foreground) + entropy("rank", foreground) + 0.5 * entropy("codes", exists)
    return loss, metrics
