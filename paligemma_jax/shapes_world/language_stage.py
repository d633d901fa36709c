"""The language stage: trains the whole model on questions about the images of a pool.

Targets of location tokens are soft: a Gaussian over the neighbouring locations.

Axes: B images, Q questions for each, R = B * Q rows, T tokens, A answer positions, V vocabulary, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Processor
from paligemma_jax.shapes_world.pool import epoch_rows, take, turn, view_index
from paligemma_jax.shapes_world.questions import Question, sample_question
from paligemma_jax.shapes_world.scenes import COLORS, MAX_OBJECTS, SHAPES
from paligemma_jax.shapes_world.vision_stage import DenseHead, dense_losses, dense_targets, normalize
from paligemma_jax.tasks.detection import NUM_LOCS, format_box
from paligemma_jax.training.loss import answer_logits, mean_where

_CROWDED = 3  # objects in an image
_MIN_PREFIX = 4  # bos, two words and the line break


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What a batch holds: how many images, questions for each, tokens after the image, and which tasks."""

    num_images: int
    num_questions: int
    text_length: int
    tasks: tuple[str, ...]
    task_weights: tuple[float, ...]


TEXT_BATCH = BatchSpec(30, 2, 48, ("caption", "answer", "detect"), (0.35, 0.25, 0.4))
SEGMENT_BATCH = BatchSpec(18, 2, 128, ("segment",), (1.0,))


@dataclasses.dataclass(frozen=True)
class QuestionBatches:
    """Batches of questions about the images of a pool, a function of the step.

    `codes` u8 [V, N, K, 16] are the mask codes of every shape in V `pool.views`. The first `easy_steps` show one
    shape, as many again up to two: a curriculum. Scenes of three or more objects come twice as often as others: nearly
    all mistakes are made there. Every `segment_every`-th batch asks for masks: their answers are long, and a batch of
    its own keeps the others short. With `turned`, which needs all eight views, such a batch shows each of its scenes
    twice, turned by different quarters: mask codes err by rotation most of all.
    """

    pool: dict[str, np.ndarray]
    codes: np.ndarray
    processor: Processor
    seed: int = 0
    easy_steps: int = 0
    segment_every: int = 3
    turned: bool = False

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        spec = SEGMENT_BATCH if step % self.segment_every == self.segment_every - 1 else TEXT_BATCH
        rng = np.random.default_rng((self.seed, step))
        copies = 2 if self.turned and spec is SEGMENT_BATCH else 1
        num_scenes = spec.num_images // copies
        rows = np.repeat(self._rows(num_scenes, step), copies)
        mirrored = np.repeat(rng.random(num_scenes) < 0.5, copies)
        record = take(self.pool, rows, mirrored)
        turns = np.zeros(len(rows), int)
        if copies == 2:
            first, apart = rng.integers(4, size=num_scenes), rng.integers(1, 4, size=num_scenes)
            turns = np.stack([first, (first + apart) % 4], axis=1).ravel()
            record = turn(record, turns)
        codes = self.codes[view_index(mirrored, turns), rows]
        groups, prefixes, suffixes = [], [], []
        for i in range(spec.num_images):
            count = int((record["shape"][i] >= 0).sum())
            kinds = [(COLORS[record["color"][i, k]], SHAPES[record["shape"][i, k]]) for k in range(count)]
            left = record["box"][i, :count, 1]
            for _ in range(spec.num_questions):
                task = str(rng.choice(spec.tasks, p=spec.task_weights))
                question = sample_question(task, kinds, left, rng)
                groups.append([i])
                prefixes.append(question.prefix)
                suffixes.append(answer_text(question, record["box"][i], codes[i]))
        num_tokens = self.processor.config.vision.num_tokens
        batch = self.processor.layout(groups, prefixes, suffixes, pad_to=num_tokens + spec.text_length)
        return {
            "pixels": record["pixels"],
            "tokens": batch.tokens,
            "image_slots": batch.image_slots,
            "prefix_length": batch.prefix_length,
            "length": batch.length,
            "dense": dense_targets(record, codes),
        }

    def _rows(self, num_scenes: int, step: int) -> np.ndarray:
        counts = (self.pool["shape"] >= 0).sum(axis=1)
        level = step // self.easy_steps if self.easy_steps else 2
        limit = (1, 2, MAX_OBJECTS)[min(level, 2)]
        eligible = np.flatnonzero(counts <= limit)
        eligible = np.concatenate([eligible, eligible[counts[eligible] >= _CROWDED]])
        return eligible[epoch_rows(len(eligible), num_scenes, step, self.seed)]


def answer_text(question: Question, boxes: np.ndarray, codes: np.ndarray) -> str:
    """The suffix; `boxes` [K, 4] are y0, x0, y1, x1 in 0..1 and `codes` [K, 16] the mask codes of the objects."""
    if question.task not in ("detect", "segment"):
        return question.suffix
    parts = []
    for index, label in question.objects:
        y0, x0, y1, x1 = boxes[index].tolist()
        masks = "".join(f"<seg{code:03d}>" for code in codes[index]) if question.task == "segment" else ""
        parts.append(f"{format_box((x0, y0, x1, y1), (1, 1))}{masks} {label}")
    return " ; ".join(parts)


def init_location_embeddings(table: jax.Array, loc_start: int, key: jax.Array) -> jax.Array:
    """An embedding table [V, D] whose location rows lie on a smooth curve, so that neighbours start similar.

    Each row is a random projection of cosines of growing frequency and falling weight, scaled like the other rows.
    """
    position = (jnp.arange(NUM_LOCS) + 0.5) / NUM_LOCS
    wave = jnp.arange(64)
    features = jnp.cos(jnp.pi * position[:, None] * wave[None, :]) / (1 + wave / 6)[None, :]
    rows = features @ jax.random.normal(key, (len(wave), table.shape[1]))
    rows = rows * (jnp.std(table) / jnp.std(rows))
    return table.at[loc_start : loc_start + NUM_LOCS].set(rows)


def soft_location_targets(sigma: float) -> np.ndarray:
    """Soft targets f32 [1024, 1024] for each true location: a Gaussian of width `sigma` locations, rows sum to one."""
    index = np.arange(NUM_LOCS)
    weight = np.exp(-0.5 * ((index[None, :] - index[:, None]) / sigma) ** 2)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def language_loss(
    model: PaliGemma,
    head: DenseHead,
    soft: jax.Array,
    loc_start: int,
    dense_weight: float,
    params: dict,
    batch: dict,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy over suffixes, with soft targets for locations, plus the dense loss of the vision stage.

    `params` holds the model's tree and the head's under "dense_head"; `soft` is the table of `soft_location_targets`.
    """
    params, head_params = {k: v for k, v in params.items() if k != "dense_head"}, params["dense_head"]
    features = model.apply({"params": params}, normalize(batch["pixels"]), method=lambda m, x: m.vision_tower(x))
    soft_tokens = model.apply({"params": params}, features, method=lambda m, x: m.multi_modal_projector(x))
    num_answers = batch["tokens"].shape[1] - soft_tokens.shape[1] - _MIN_PREFIX
    logits, targets, exists = answer_logits(model, params, soft_tokens, batch, num_answers)
    log_probs = jax.nn.log_softmax(logits)
    loc = targets - loc_start
    is_loc = (loc >= 0) & (loc < NUM_LOCS)
    hard = -jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[..., 0]
    soft_targets = jnp.take(soft, jnp.clip(loc, 0, NUM_LOCS - 1), axis=0)
    softened = -jnp.sum(soft_targets * log_probs[:, :, loc_start : loc_start + NUM_LOCS], axis=-1)
    dense, dense_metrics = dense_losses(
        head.apply({"params": head_params}, features, batch["dense"]["centre"]), batch["dense"]
    )
    predicted = jnp.argmax(log_probs, axis=-1)
    metrics = {
        "word_acc": mean_where((predicted == targets).astype(jnp.float32), exists & ~is_loc),
        "loc_error": mean_where(jnp.abs(predicted - targets) / NUM_LOCS, exists & is_loc),
        **dense_metrics,
    }
    return mean_where(jnp.where(is_loc, softened, hard), exists) + dense_weight * dense, metrics


def make_optimizer(num_steps: int, learning_rate: float, warmup: int = 200) -> optax.GradientTransformation:
    """AdamW with a linear warm-up, a cosine decay to a fiftieth, and weight decay of matrices only."""
    warmup = min(warmup, num_steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, num_steps, learning_rate / 50)

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adam = optax.adamw(schedule, b2=0.98, weight_decay=0.01, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def scale_updates(optimizer: optax.GradientTransformation, name: str, factor: float) -> optax.GradientTransformation:
    """The same optimizer with the updates of one part of the parameters multiplied by `factor`."""

    def update(grads: dict, state: optax.OptState, params: dict | None = None) -> tuple[dict, optax.OptState]:
        updates, state = optimizer.update(grads, state, params)
        return {**updates, name: jax.tree.map(lambda u: factor * u, updates[name])}, state

    return optax.GradientTransformation(optimizer.init, update)
