"""The small CLIP of the shipped patch ViT: image and text towers trained on scenes and their captions.

The image tower starts from the first layers of the shipped PaliGemma's encoder, and learns in the last of them only, on
what the others give, which is computed once. Beside CLIP's loss over whole captions, each picture is asked which
phrases are true of it ("star", "a red circle"), and embeddings of pictures and captions are drawn to the sum of those
of the phrases that name their shapes one by one: a student can only say what is a sum over places.

Axes: B pictures, T tokens, Q phrases, C kinds of shapes (a colour and a shape), P patches, K object slots, D width.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from paligemma_jax import checkpoints
from paligemma_jax.config import VisionConfig
from paligemma_jax.files import replacing
from paligemma_jax.patch_vit import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from paligemma_jax.patch_vit.clip import ClipModel
from paligemma_jax.patch_vit.preprocess import PixelSettings
from paligemma_jax.patch_vit.tokenizer import END, START, ClipTokenizer
from paligemma_jax.shapes_world.language_stage import make_optimizer
from paligemma_jax.shapes_world.pool import epoch_rows
from paligemma_jax.shapes_world.questions import article, caption
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.loop import fit
from paligemma_jax.training.step import init_state, make_step

_LAYERS = 5  # of the shipped image encoder that the teacher takes; it learns in the last of them
TEXT = ClipTextConfig(context=32, width=64, num_layers=2, mlp_dim=256, num_heads=4)
PROJECTION = 96
_PHRASE_WEIGHT = 4.0
_SUM_WEIGHT = 4.0
_NUM_KINDS = len(COLORS) * len(SHAPES)
_CHUNK = 64
_TOKEN_SIZE = 1.11  # standard deviation of what enters the layers of the shipped encoder


def phrases() -> list[str]:
    """What a picture is asked: each shape, each colour, and each shape of each colour with and without an article."""
    kinds = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    return [*SHAPES, *COLORS, *kinds, *(f"{article(kind)} {kind}" for kind in kinds)]


def phrase_truths(shape: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Which of `phrases` are true of pictures with these shapes and colours i8 [B, K], -1 where there is none:
    f32 [B, Q]."""
    has_shape = (shape[:, :, None] == np.arange(len(SHAPES))).any(axis=1)
    has_color = (color[:, :, None] == np.arange(len(COLORS))).any(axis=1)
    has_kind = kind_counts(shape, color) > 0
    return np.concatenate([has_shape, has_color, has_kind, has_kind], axis=1).astype(np.float32)


def kind_counts(shape: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How many of each kind are in pictures with these shapes and colours i8 [B, K]: f32 [B, C]."""
    kind = np.where(shape >= 0, color * len(SHAPES) + shape, -1)
    return (kind[:, :, None] == np.arange(_NUM_KINDS)).sum(axis=1).astype(np.float32)


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


def geometry(tokenizer: ClipTokenizer, encoder: VisionConfig) -> ClipConfig:
    """The teacher's sizes around its vocabulary and the encoder that it starts from."""
    text = dataclasses.replace(TEXT, vocab_size=len(tokenizer.vocabulary), eos_token_id=tokenizer.vocabulary[END])
    sizes = dataclasses.asdict(encoder) | {"num_layers": _LAYERS, "activation": "gelu_pytorch_tanh"}
    return ClipConfig(ClipVisionConfig(**sizes), text, PROJECTION)


def from_siglip(tower: dict, params: dict) -> dict:
    """A CLIP image tower's `params` with the first layers of a SigLIP `tower`.

    What CLIP has besides stays near to the identity: the patches' bias is added to their positions, the norm before the
    layers keeps the mean size of tokens.
    """
    patches, positions = tower["patch_embedding"], tower["position_embedding"]["weight"]
    positions = positions + patches["bias"][None]
    size = jnp.full_like(params["pre_layernorm"]["weight"], _TOKEN_SIZE)
    return params | {
        "patch_embedding": {"weight": patches["weight"]},
        "position_embedding": {"weight": jnp.pad(positions, ((1, 0), (0, 0)))},
        "pre_layernorm": {"weight": size, "bias": jnp.zeros_like(size)},
        **{f"layers_{i}": tower[f"layers_{i}"] for i in range(_LAYERS)},
    }


class TeacherTraining(nn.Module):
    """CLIP above what enters the last layer of its image tower, with what scores phrases."""

    config: ClipConfig

    def setup(self):
        self.clip = ClipModel(self.config)
        self.phrase_scale = self.param("phrase_scale", nn.initializers.constant(2.3), ())
        self.phrase_bias = self.param("phrase_bias", nn.initializers.constant(-3.0), ())

    def __call__(
        self, hidden: jax.Array, captions: jax.Array, asked: jax.Array, counts: jax.Array
    ) -> dict[str, jax.Array]:
        """Tokens [B, 1 + P, D], ids of captions [B, T] and of `phrases` [Q, T], and counts of kinds [B, C] to logits of
        pictures by captions [B, B] and by phrases [B, Q], and to the mean cosines of pictures and of captions with the
        sums of their phrases."""
        image = _unit(self.clip.visual_projection(self.clip.vision_model.class_token(hidden)))
        whole, parts = _unit(self.clip.embed_text(captions)), _unit(self.clip.embed_text(asked))
        kinds = parts[-2 * _NUM_KINDS :].reshape(2, _NUM_KINDS, -1).mean(axis=0)  # without and with an article
        sums = _unit(counts @ kinds)
        return {
            "image_sum": (image * sums).sum(axis=-1).mean(),
            "caption_sum": (whole * sums).sum(axis=-1).mean(),
            "captions": image @ whole.T * jnp.exp(jnp.minimum(self.clip.logit_scale, jnp.log(100.0))),
            "phrases": image @ parts.T * jnp.exp(self.phrase_scale) + self.phrase_bias,
        }


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def teacher_loss(model: TeacherTraining, asked: np.ndarray, params: Any, batch: dict) -> tuple[jax.Array, dict]:
    """Loss of a batch of `CaptionBatches`: captions, phrases and sums."""
    hidden = batch["hidden"].astype(jnp.float32)
    out = model.apply({"params": params}, hidden, batch["captions"], asked, batch["counts"])
    same = (batch["captions"][:, None] == batch["captions"][None]).all(axis=-1).astype(jnp.float32)
    targets = same / same.sum(axis=1, keepdims=True)  # pictures with equal captions are equally right
    logits = out["captions"]
    captions = optax.softmax_cross_entropy(logits, targets).mean() / 2
    captions += optax.softmax_cross_entropy(logits.T, targets).mean() / 2
    asked_of = optax.sigmoid_binary_cross_entropy(out["phrases"], batch["phrases"]).mean()
    found = jnp.take_along_axis(same, jnp.argmax(logits, axis=0)[:, None], axis=1)
    right = ((out["phrases"] > 0) == (batch["phrases"] > 0)).all(axis=1).astype(jnp.float32)
    metrics = {"captions": captions, "phrases": asked_of}
    metrics |= {"recall_1": found.mean(), "phrases_right": right.mean()}
    metrics |= {name: out[name] for name in ("image_sum", "caption_sum")}
    apart = 2 - out["image_sum"] - out["caption_sum"]
    return captions + _PHRASE_WEIGHT * asked_of + _SUM_WEIGHT * apart, metrics


@dataclasses.dataclass(frozen=True)
class CaptionBatches:
    """Batches of a pool of scenes with their captions as a function of the step; `hidden` f16 [N, 1 + P, D] is what
    enters the last layer of the image tower."""

    pool: dict[str, np.ndarray]
    hidden: np.ndarray
    tokenizer: ClipTokenizer
    batch_size: int
    seed: int

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        rows = epoch_rows(len(self.hidden), self.batch_size, step, self.seed)
        shape, color = self.pool["shape"][rows], self.pool["color"][rows]
        return {
            "hidden": self.hidden[rows],
            "captions": self.tokenizer(captions(shape, color)),
            "phrases": phrase_truths(shape, color),
            "counts": kind_counts(shape, color),
        }


def captions(shape: np.ndarray, color: np.ndarray) -> list[str]:
    """The caption of each picture, from its shapes and colours i8 [B, K]; equal ones are of equal contents."""
    rows = zip(shape, color, strict=True)
    return [caption([(COLORS[c], SHAPES[s]) for s, c in zip(*row, strict=True) if s >= 0]) for row in rows]


def train_teacher(
    work: Path,
    pools: Sequence[dict[str, np.ndarray]],
    encoder_from: str | Path,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> Clip:
    """The CLIP of some pools of scenes; goes on where an earlier run with the same folder stopped.

    `encoder_from` is the PaliGemma whose image encoder it starts from.
    """
    base, params = checkpoints.load(encoder_from, "float32", progress=False)
    asked, pictures = phrases(), [picture for pool in pools for picture in pool["pixels"]]
    pool = {key: np.concatenate([pool[key] for pool in pools]) for key in ("shape", "color")}
    tokenizer = train_vocabulary([*asked, *captions(pool["shape"][:2000], pool["color"][:2000])])
    config = geometry(tokenizer, base.vision)
    model = TeacherTraining(config)
    ids = tokenizer(asked, max(map(len, tokenizer.encode(asked))))
    first = Clip(config, _init(config, params["vision_tower"], seed), tokenizer, _settings(config))
    example = (jnp.zeros((1, 2, config.vision.width)), ids[:1], ids, jnp.ones((1, _NUM_KINDS)))
    start = jax.jit(model.init)(jax.random.key(seed), *example)["params"]
    start["clip"] = first.params
    optimizer = only_trained(make_optimizer(steps, learning_rate))
    state = fit(
        init_state(start, optimizer),
        make_step(functools.partial(teacher_loss, model, ids), optimizer),
        CaptionBatches(pool, _hidden(work / "hidden.npy", first, pictures), tokenizer, batch_size, seed),
        steps,
        checkpoints=open_checkpoints(work / "teacher_checkpoints"),
        save_every=500,
        name="teacher",
    )
    return Clip(config, state.params["clip"], tokenizer, _settings(config))


def only_trained(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer without the image tower up to its last layer."""
    last = (f"layers_{_LAYERS - 1}", "post_layernorm")

    def labels(params: Any) -> Any:
        def label(path: tuple[Any, ...], _: Any) -> str:
            names = [entry.key for entry in path]
            return "fixed" if "vision_model" in names and names[2] not in last else "trained"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"trained": optimizer, "fixed": optax.set_to_zero()}, labels)


def _init(config: ClipConfig, tower: dict, seed: int) -> dict:
    """Random parameters, those of the encoder's layers in the image tower."""
    side = config.vision.image_size
    ids = jnp.zeros((1, config.text.context), jnp.int32)
    params = jax.jit(ClipModel(config).init)(jax.random.key(seed), jnp.zeros((1, side, side, 3)), ids)["params"]
    return params | {"vision_model": from_siglip(tower, params["vision_model"])}


def _settings(config: ClipConfig) -> PixelSettings:
    """The encoder's own, which squeeze a picture to values from -1 to 1."""
    half = (0.5, 0.5, 0.5)
    return PixelSettings(config.vision.image_size, "bicubic", mean=half, std=half)


def _hidden(path: Path, clip: Clip, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """What enters the last layer, f16 [N, 1 + P, D], of N pictures u8 [S, S, 3]; computed once."""
    if not path.exists():
        vision = clip.config.vision
        with replacing(path) as temporary:
            shape = (len(pictures), vision.num_tokens + 1, vision.width)
            out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            for start in tqdm(range(0, len(pictures), _CHUNK), desc="image tower", unit_scale=_CHUNK, unit="picture"):
                part = clip.preprocess([np.asarray(image) for image in pictures[start : start + _CHUNK]])
                out[start : start + _CHUNK] = clip.before_last(part)
            out.flush()
    return np.load(path, mmap_mode="r")
