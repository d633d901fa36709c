"""The stages that build the shipped model from a seed: tokenizer, mask VQ-VAE, image encoder, whole model.

Each stage leaves its result in the work directory and is skipped when that is there; the two long ones also save
checkpoints on their way. Running the same command again therefore goes on where it was stopped.
"""

import dataclasses
import functools
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from tqdm import tqdm

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints.mask_vae import load_mask_vae, save_mask_vae
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import replacing, write_json
from paligemma_jax.models import mask_vae
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer
from paligemma_jax.shapes_world import language_stage, vision_stage
from paligemma_jax.shapes_world.mask_vae_stage import train_mask_vae
from paligemma_jax.shapes_world.pool import MASK_SIDE, mixed_scene_at, scene_pool, views
from paligemma_jax.shapes_world.questions import sample_question
from paligemma_jax.shapes_world.scenes import MAX_OBJECTS
from paligemma_jax.shapes_world.wide_scenes import rotated_masks
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.loop import fit
from paligemma_jax.training.step import init_state, make_step

_MASK_BATCH = 512
_FIRST = ("seed", "num_scenes", "wide_share", "mask_vae", "mask_vae_steps", "mask_vae_learning_rate", "start_from")
_TOKENIZER, _MASK_VAE = "tokenizer.model", "vae-oid.npz"
TASKS = ("caption", "answer", "detect", "segment")

VISION = VisionConfig(image_size=128, patch_size=16, width=192, num_layers=6, mlp_dim=576, num_heads=6)
TEXT = TextConfig(  # every structural feature of Gemma 2, in small; sizes that a formula could confuse are unlike
    version=2,
    width=144,
    num_layers=4,
    mlp_dim=432,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    query_scalar=48.0,
    attn_softcap=50.0,
    final_softcap=30.0,
    sliding_window=96,
    max_positions=512,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How each stage is trained; configs/make_tiny.py says what the numbers mean and has those of the shipped model."""

    seed: int
    num_scenes: int
    wide_share: float
    mask_vae: str
    mask_vae_steps: int
    mask_vae_learning_rate: float
    vision_steps: int
    language_steps: int
    easy_steps: int
    segment_every: int
    vision_learning_rate: float
    language_learning_rate: float
    vision_factor: float
    loc_sigma: float
    dense_weight: float
    start_from: str


def build(work_dir: str | Path, output_dir: str | Path, recipe: Recipe) -> None:
    """Run all stages and write a Hugging Face directory with the mask VQ-VAE beside it."""
    work, output = Path(work_dir), Path(output_dir)
    work.mkdir(parents=True, exist_ok=True)
    _check_begun(work, recipe)
    if recipe.start_from:
        _copy(recipe.start_from, work, _TOKENIZER, *([_MASK_VAE] if recipe.mask_vae == "keep" else []))
    tokenizer = train_tokenizer(work / _TOKENIZER, recipe.seed, recipe.wide_share)
    config = model_config(tokenizer)
    pool = scene_pool(work, recipe.seed, recipe.num_scenes, VISION.image_size, VISION.patch_size, recipe.wide_share)
    pool = {key: value if key in ("pixels", "mask") else np.array(value) for key, value in pool.items()}
    codes = mask_codes(work, pool, recipe)
    dense = train_vision(work, pool, codes, recipe)
    params = train_language(work, config, tokenizer, pool, codes, dense, recipe)
    export(output, work, config, params)


def _check_begun(work: Path, recipe: Recipe) -> None:
    """Note what decides about the first stages; ConfigError if the folder was begun with something else."""
    path, wanted = work / "recipe.json", {name: getattr(recipe, name) for name in _FIRST}
    if not path.exists():
        write_json(path, wanted)
    begun = json.loads(path.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if begun.get(name) != value:
            raise ConfigError(
                f"{name}={value!r} is not possible: {work} was begun with {begun.get(name)!r}; give another work_dir"
            )


def export(output: Path, work: Path, config: PaliGemmaConfig, params: Any) -> None:
    """Write weights (bfloat16), config, tokenizer, preprocessor settings and the mask VQ-VAE."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoints.save(output, config, params, "bfloat16")
    ImageSettings(config.vision.image_size).save(output, config.vision.num_tokens)
    _copy(work, output, _TOKENIZER, _MASK_VAE)
    print(f"the model is in {output}", file=sys.stderr)


def _copy(source: str | Path, target: Path, *names: str) -> None:
    for name in names:
        with replacing(target / name) as temporary:
            temporary.write_bytes((Path(source) / name).read_bytes())


def model_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    """The geometry around a tokenizer; the table's rows are rounded up to a multiple of 64."""
    vocab_size = -(-(tokenizer.vocab_size + 1) // 64) * 64
    text = dataclasses.replace(TEXT, vocab_size=vocab_size)
    return PaliGemmaConfig(vision=VISION, text=text, image_token_id=tokenizer.vocab_size)


def sample_texts(seed: int, num_scenes: int = 2000, wide_share: float = 0.0) -> Iterator[str]:
    """Prompts and answers of many scenes, without their locations."""
    for index in range(num_scenes):
        scene = mixed_scene_at(seed + 1, index, wide_share)
        kinds = [shape.kind for shape in scene.shapes]
        left = np.array([shape.box[0] for shape in scene.shapes])
        rng = np.random.default_rng((seed, index))
        for task in TASKS:
            question = sample_question(task, kinds, left, rng)
            yield question.prefix
            yield question.suffix or " ; ".join(f" {label}" for _, label in question.objects)


def train_tokenizer(path: Path, seed: int, wide_share: float = 0.0) -> Tokenizer:
    """A SentencePiece model of the world's words, every byte, and all location and segmentation tokens."""
    if not path.exists():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in sample_texts(seed, wide_share=wide_share) if text),
            model_writer=model,
            model_type="bpe",
            vocab_size=1696,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            user_defined_symbols=["<mask>", "\n", *LOC_TOKENS, *SEG_TOKENS],
            minloglevel=2,
        )
        with replacing(path) as temporary:
            temporary.write_bytes(model.getvalue())
    return Tokenizer.from_file(path)


def mask_codes(work: Path, pool: dict[str, np.ndarray], recipe: Recipe) -> np.ndarray:
    """Mask codes of every shape of the pool: u8 [V, N, K, 16]; trains the VQ-VAE first.

    V is 2, as drawn and mirrored, or 8 if there are wide scenes: all `views`.
    """
    weights, path = work / _MASK_VAE, work / "mask_codes.npy"
    if not weights.exists():
        save_mask_vae(
            weights,
            train_mask_vae(
                jax.random.key(recipe.seed),
                _mask_batches(pool, recipe.seed, 32, recipe.wide_share),
                recipe.mask_vae_steps,
                recipe.mask_vae_learning_rate,
                params=load_mask_vae(Path(recipe.start_from) / _MASK_VAE) if recipe.start_from else None,
            ),
        )
    if not path.exists():
        params = load_mask_vae(weights)
        codes = np.zeros((8 if recipe.wide_share else 2, *pool["shape"].shape, 16), np.uint8)
        occupied = np.argwhere(pool["shape"] >= 0)
        starts = range(0, len(occupied), _MASK_BATCH)
        for start in tqdm(starts, desc="encoding masks", unit_scale=_MASK_BATCH, unit="mask"):
            rows, slots = np.resize(occupied[start : start + _MASK_BATCH], (_MASK_BATCH, 2)).T
            masks = _unpack(pool["mask"][rows, slots]).astype(np.float32)
            for index, view in enumerate(views(masks)[: len(codes)]):
                codes[index, rows, slots] = mask_vae.encode(params, jnp.asarray(view))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, codes)
    return np.load(path)


def _mask_batches(pool: dict[str, np.ndarray], seed: int, batch_size: int, wide_share: float) -> Iterator[np.ndarray]:
    """Masks of the pool, half of them mirrored; in the place of a share of them some at any rotation."""
    num_rotated = round(batch_size * wide_share)
    occupied = np.argwhere(pool["shape"] >= 0)
    for step in itertools.count():
        rng = np.random.default_rng((seed, step))
        rows, slots = occupied[rng.integers(len(occupied), size=batch_size)].T
        masks = _unpack(pool["mask"][rows, slots])
        masks = np.where((rng.random(batch_size) < 0.5)[:, None, None], masks[..., ::-1], masks)
        masks[:num_rotated] = rotated_masks(rng, num_rotated, MASK_SIDE)
        yield masks


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, axis=-1).reshape(*packed.shape[:-1], MASK_SIDE, MASK_SIDE)


def train_vision(work: Path, pool: dict[str, np.ndarray], codes: np.ndarray, recipe: Recipe) -> Any:
    """Parameters of the image encoder and its dense head: {"vision_tower", "head"}."""
    model = vision_stage.DenseModel(VISION)
    pixels = jnp.zeros((1, VISION.image_size, VISION.image_size, 3))
    params = jax.jit(model.init)(jax.random.key(recipe.seed), pixels, jnp.zeros((1, MAX_OBJECTS), jnp.int32))["params"]
    if recipe.start_from:
        params["vision_tower"] = _load_start(recipe)["vision_tower"]
    else:
        params = vision_stage.mimetic_init(params)
    # Stopped half way down its cosine: the next stage goes on with the encoder.
    optimizer = language_stage.make_optimizer(2 * recipe.vision_steps, recipe.vision_learning_rate)
    state = fit(
        init_state(params, optimizer),
        make_step(functools.partial(vision_stage.dense_loss, model), optimizer),
        vision_stage.DenseBatches(pool, codes, 64, recipe.seed),
        recipe.vision_steps,
        checkpoints=open_checkpoints(work / "vision"),
        name="vision",
    )
    return state.params


def train_language(
    work: Path,
    config: PaliGemmaConfig,
    tokenizer: Tokenizer,
    pool: dict[str, np.ndarray],
    codes: np.ndarray,
    dense: Any,
    recipe: Recipe,
) -> Any:
    """Parameters of the whole model, the encoder starting from `dense`."""
    model, head = PaliGemma(config), vision_stage.DenseHead()
    if recipe.start_from:
        params = _load_start(recipe)
    else:
        params = init_params(model, jax.random.key(recipe.seed + 1))
        table = params["language_model"]["embed_tokens"]
        key = jax.random.key(recipe.seed + 2)
        table["weight"] = language_stage.init_location_embeddings(table["weight"], tokenizer.loc_start, key)
    params["vision_tower"] = dense["vision_tower"]
    soft = jnp.asarray(language_stage.soft_location_targets(recipe.loc_sigma))
    loss = functools.partial(language_stage.language_loss, model, head, soft, tokenizer.loc_start, recipe.dense_weight)
    optimizer = language_stage.make_optimizer(recipe.language_steps, recipe.language_learning_rate)
    optimizer = language_stage.scale_updates(optimizer, "vision_tower", recipe.vision_factor)
    settings = ImageSettings(config.vision.image_size)
    state = fit(
        init_state({**params, "dense_head": dense["head"]}, optimizer),
        make_step(loss, optimizer),
        language_stage.QuestionBatches(
            pool,
            codes,
            Processor(config, tokenizer, settings),
            recipe.seed,
            recipe.easy_steps,
            recipe.segment_every,
            turned=recipe.wide_share > 0,
        ),
        recipe.language_steps,
        checkpoints=open_checkpoints(work / "language"),
        name="language",
    )
    return {key: value for key, value in state.params.items() if key != "dense_head"}


def _load_start(recipe: Recipe) -> Any:
    """Parameters of the checkpoint `start_from`, float32."""
    return checkpoints.load(recipe.start_from, "float32", progress=False)[1]


def init_params(model: PaliGemma, key: jax.Array) -> Any:
    """Random float32 parameters of a model."""
    cfg = model.config.vision
    pixels = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    row, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return jax.jit(model.init)(key, pixels, row, row, lengths, lengths)["params"]
