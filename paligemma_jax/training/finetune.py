"""Fine-tuning of a whole model on JSON lines, with the recipe of big_vision's transfers."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict

from paligemma_jax import numerics, ops
from paligemma_jax.errors import ConfigError
from paligemma_jax.loading import load
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training.data import check_pictures, make_batches, read_jsonl
from paligemma_jax.training.loop import fit, init_state, make_step, open_checkpoints
from paligemma_jax.training.loss import suffix_loss


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimizer settings; the defaults are big_vision's for a data set of one's own."""

    learning_rate: float = 1e-5
    weight_decay: float = 3e-7  # per step, not multiplied by the learning rate
    b2: float = 0.999
    clip_norm: float = 1.0
    warmup_fraction: float = 0.05
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name, low, high in (
            ("learning_rate", 0.0, float("inf")),
            ("weight_decay", 0.0, float("inf")),
            ("b2", 0.0, 1.0),
            ("clip_norm", 0.0, float("inf")),
            ("warmup_fraction", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value < high:
                raise ConfigError(f"{name}={value} is not possible: give a number from {low:g} to below {high:g}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained on what, and where it goes; configs/finetune.py says what the fields mean."""

    checkpoint: str
    dtype: str
    data: str
    image_root: str
    output_dir: str
    epochs: int
    batch_size: int
    text_length: int
    seed: int
    log_every: int
    save_every: int
    save_minutes: float
    check_pictures: bool

    def __post_init__(self):
        for name in ("epochs", "batch_size", "text_length", "log_every", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is not possible: give an integer of at least 1")
        if not self.save_minutes > 0:
            raise ConfigError(f"save_minutes={self.save_minutes} is not possible: give a number above 0")


def finetune(settings: Settings, recipe: Recipe, claim: Callable[[], None] = lambda: None) -> Path:
    """Train, going on where an earlier run with the same output_dir stopped.

    Args:
      claim: called when data and model are read and nothing is wrong with them, before anything is written.

    Returns:
      The directory of the tuned model, in Hugging Face layout.

    Raises:
      UserError: see the message.
    """
    examples = read_jsonl(settings.data, settings.image_root)
    model = load(settings.checkpoint, settings.dtype, prepare=False)
    if any(map(ops.is_weight, flatten_dict(model.params).values())):
        raise ConfigError(f"{settings.checkpoint} is quantized and cannot be trained: give the original weights")
    sizes = {name: getattr(settings, name) for name in ("batch_size", "epochs", "text_length", "seed")}
    batches = make_batches(examples, model.processor, **sizes)
    if settings.check_pictures:
        check_pictures(examples, model.processor.image_settings)
    print(f"{len(examples)} examples, {len(batches)} steps of {settings.batch_size}", file=sys.stderr)

    optimizer = make_optimizer(recipe, len(batches))
    loss = functools.partial(suffix_loss, PaliGemma(model.config), recipe.label_smoothing, batches.num_answers)
    output = Path(settings.output_dir)
    claim()
    state = fit(
        init_state(model.params, optimizer),
        make_step(loss, optimizer),
        batches,
        len(batches),
        checkpoints=open_checkpoints(output / "checkpoints"),
        save_every=settings.save_every,
        save_minutes=settings.save_minutes,
        log_every=settings.log_every,
        name="finetune",
        explain=functools.partial(numerics.explain_batch, model.config),
    )
    model.params = state.params
    model.save(output)
    return output


def make_optimizer(recipe: Recipe, num_steps: int) -> optax.GradientTransformation:
    """Adam with a linear warm-up, a cosine to zero and decay of the picture side's kernels only."""
    warmup = round(recipe.warmup_fraction * num_steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, max(num_steps, warmup + 1))
    # optax multiplies the decay by the learning rate, big_vision by the schedule alone.
    decay = recipe.weight_decay / recipe.learning_rate if recipe.learning_rate else 0.0
    adam = optax.adamw(schedule, b2=recipe.b2, weight_decay=decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), adam)


def _decayed(params: Any) -> Any:
    """True for the kernels of image encoder and projector."""

    def is_kernel(path: tuple[Any, ...], value: jax.Array) -> bool:
        names = [entry.key for entry in path]
        picture_side = names[0] in ("vision_tower", "multi_modal_projector")
        return picture_side and value.ndim > 1 and names[-2] != "position_embedding"

    return jax.tree_util.tree_map_with_path(is_kernel, params)
