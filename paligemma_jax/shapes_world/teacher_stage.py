"""The small CLIP of the shipped patch ViT: image and text towers trained on scenes and their captions.

Beside CLIP's loss over whole captions, each picture is asked which phrases are true of it ("star", "a red circle"),
and linear heads, dropped afterwards, predict what each patch shows: so a small tower learns in minutes.

Axes: B pictures, T tokens, Q phrases, P patches, K object slots.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from paligemma_jax.patch_vit import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from paligemma_jax.patch_vit.clip import ClipModel
from paligemma_jax.patch_vit.preprocess import MEAN, STD, PixelSettings
from paligemma_jax.patch_vit.tokenizer import END, START, ClipTokenizer
from paligemma_jax.shapes_world.language_stage import make_optimizer
from paligemma_jax.shapes_world.pool import epoch_rows, take
from paligemma_jax.shapes_world.questions import article, caption
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES
from paligemma_jax.shapes_world.vision_stage import dense_targets, mimetic_tower, sinusoidal_positions
from paligemma_jax.tasks.detection import NUM_CODES
from paligemma_jax.training.loop import fit, init_state, make_step, open_checkpoints
from paligemma_jax.training.loss import mean_where

VISION = ClipVisionConfig(image_size=120, patch_size=15, width=96, num_layers=4, mlp_dim=384, num_heads=4)
TEXT = ClipTextConfig(context=32, width=64, num_layers=2, mlp_dim=256, num_heads=4)
PROJECTION = 96
_NUM_KINDS = len(SHAPES) * len(COLORS)
_PHRASE_WEIGHT, _DENSE_WEIGHT = 4.0, 1.0


def phrases() -> list[str]:
    """What a picture is asked: each shape, each colour, and each shape of each colour with and without an article."""
    kinds = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    return [*SHAPES, *COLORS, *kinds, *(f"{article(kind)} {kind}" for kind in kinds)]


def phrase_truths(shape: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Which of `phrases` are true of pictures with these shapes and colours i8 [B, K], -1 where there is none:
    f32 [B, Q]."""
    has_shape = (shape[:, :, None] == np.arange(len(SHAPES))).any(axis=1)
    has_color = (color[:, :, None] == np.arange(len(COLORS))).any(axis=1)
    kind = np.where(shape >= 0, color * len(SHAPES) + shape, -1)
    has_kind = (kind[:, :, None] == np.arange(len(COLORS) * len(SHAPES))).any(axis=1)
    return np.concatenate([has_shape, has_color, has_kind, has_kind], axis=1).astype(np.float32)


def train_vocabulary(texts: list[str]) -> ClipTokenizer:
    """A tokenizer of CLIP's kind whose merges are those of some texts; every byte has a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    words = [word.strip(",") for text in texts for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in (*(f"{letter}</w>" for letter in letters), START, END):
        vocabulary.setdefault(token, len(vocabulary))
    return ClipTokenizer(vocabulary, [tuple(pair) for pair in model["merges"]], TEXT.context)


def geometry(tokenizer: ClipTokenizer) -> ClipConfig:
    """The teacher's sizes around its vocabulary."""
    text = dataclasses.replace(TEXT, vocab_size=len(tokenizer.vocabulary), eos_token_id=tokenizer.vocabulary[END])
    return ClipConfig(VISION, text, PROJECTION)


class TeacherTraining(nn.Module):
    """CLIP with the heads that help to train it."""

    config: ClipConfig

    def setup(self):
        self.clip = ClipModel(self.config)
        self.kind = nn.Dense(_NUM_KINDS + 1)
        self.phrase_scale = self.param("phrase_scale", nn.initializers.constant(2.3), ())
        self.phrase_bias = self.param("phrase_bias", nn.initializers.constant(-3.0), ())

    def __call__(self, pixels: jax.Array, captions: jax.Array, asked: jax.Array) -> dict[str, jax.Array]:
        """Pixels [B, S, S, 3], ids of captions [B, T] and of phrases [Q, T] to logits: of pictures by captions [B, B],
        of pictures by phrases [B, Q], and of each patch's kind [B, P, K + 1], the last the background."""
        tower = self.clip.vision_model
        hidden = tower.before_last(pixels)
        image = _unit(self.clip.visual_projection(tower.class_token(hidden)))
        whole, parts = _unit(self.clip.embed_text(captions)), _unit(self.clip.embed_text(asked))
        patches = hidden[:, 1:]
        return {
            "captions": image @ whole.T * jnp.exp(jnp.minimum(self.clip.logit_scale, jnp.log(100.0))),
            "phrases": image @ parts.T * jnp.exp(self.phrase_scale) + self.phrase_bias,
            "kind": self.kind(patches),
        }


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def teacher_loss(model: TeacherTraining, asked: np.ndarray, params: Any, batch: dict) -> tuple[jax.Array, dict]:
    """Loss of a batch of `CaptionBatches`: captions, phrases, patches."""
    mean, std = (jnp.array(values)[None, None, None] for values in (MEAN, STD))
    pixels = (batch["pixels"].astype(jnp.float32) / 255 - mean) / std
    out = model.apply({"params": params}, pixels, batch["captions"], asked)
    same = (batch["captions"][:, None] == batch["captions"][None]).all(axis=-1).astype(jnp.float32)
    targets = same / same.sum(axis=1, keepdims=True)  # pictures with equal captions are equally right
    logits = out["captions"]
    captions = optax.softmax_cross_entropy(logits, targets).mean() / 2
    captions += optax.softmax_cross_entropy(logits.T, targets).mean() / 2
    asked_of = optax.sigmoid_binary_cross_entropy(out["phrases"], batch["phrases"]).mean()
    kinds = optax.softmax_cross_entropy_with_integer_labels(out["kind"], batch["kind"])
    dense = mean_where(kinds, batch["supervised"])
    named = mean_where((jnp.argmax(out["kind"], axis=-1) == batch["kind"]).astype(jnp.float32), batch["foreground"])
    found = jnp.take_along_axis(same, jnp.argmax(logits, axis=0)[:, None], axis=1)
    right = ((out["phrases"] > 0) == (batch["phrases"] > 0)).all(axis=1).astype(jnp.float32)
    metrics = {"captions": captions, "phrases": asked_of, "dense": dense}
    metrics |= {"recall_1": found.mean(), "phrases_right": right.mean(), "patches_right": named}
    return captions + _PHRASE_WEIGHT * asked_of + _DENSE_WEIGHT * dense, metrics


@dataclasses.dataclass(frozen=True)
class CaptionBatches:
    """Batches of a pool of scenes with their captions as a function of the step, half of the pictures mirrored."""

    pool: dict[str, np.ndarray]
    tokenizer: ClipTokenizer
    batch_size: int
    seed: int

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        rows = epoch_rows(len(self.pool["pixels"]), self.batch_size, step, self.seed)
        mirrored = np.random.default_rng((self.seed, step)).random(self.batch_size) < 0.5
        record = take(self.pool, rows, mirrored)
        no_codes = np.zeros((*record["shape"].shape, NUM_CODES), np.int32)
        dense = dense_targets(record, no_codes)
        return {
            "pixels": record["pixels"],
            "captions": self.tokenizer(captions(record["shape"], record["color"])),
            "phrases": phrase_truths(record["shape"], record["color"]),
            "kind": np.where(dense["foreground"], dense["color"] * len(SHAPES) + dense["shape"], _NUM_KINDS),
            **{name: dense[name] for name in ("foreground", "supervised")},
        }


def captions(shape: np.ndarray, color: np.ndarray) -> list[str]:
    """The caption of each picture, from its shapes and colours i8 [B, K]; equal ones are of equal contents."""
    rows = zip(shape, color, strict=True)
    return [caption([(COLORS[c], SHAPES[s]) for s, c in zip(*row, strict=True) if s >= 0]) for row in rows]


def train_teacher(
    work: Path,
    pool: dict[str, np.ndarray],
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    start: Clip | None = None,
) -> Clip:
    """The CLIP of a pool of scenes; goes on where an earlier run with the same folder stopped.

    `start` is one that an earlier run made, to go on with; its tokenizer is kept.
    """
    asked = phrases()
    texts = [*asked, *captions(pool["shape"][:2000], pool["color"][:2000])]
    tokenizer = start.tokenizer if start else train_vocabulary(texts)
    config = geometry(tokenizer)
    model = TeacherTraining(config)
    ids = tokenizer(asked, max(map(len, tokenizer.encode(asked))))
    pixels = jnp.zeros((1, VISION.image_size, VISION.image_size, 3))
    params = jax.jit(model.init)(jax.random.key(seed), pixels, ids[:1], ids)["params"]
    if start:
        params["clip"] = start.params
    else:
        params["clip"]["vision_model"] = _mimetic(params["clip"]["vision_model"])
    optimizer = make_optimizer(steps, learning_rate)
    state = fit(
        init_state(params, optimizer),
        make_step(functools.partial(teacher_loss, model, ids), optimizer),
        CaptionBatches(pool, tokenizer, batch_size, seed),
        steps,
        checkpoints=open_checkpoints(work / "teacher_checkpoints"),
        save_every=200,
        name="teacher",
    )
    return Clip(config, state.params["clip"], tokenizer, PixelSettings(VISION.image_size, "bicubic"))


def _mimetic(tower: dict) -> dict:
    """See `vision_stage.mimetic_init`; the class token's position is 0."""
    positions = np.pad(sinusoidal_positions(VISION.num_tokens, VISION.width), ((1, 0), (0, 0)))
    return mimetic_tower(tower, positions)
