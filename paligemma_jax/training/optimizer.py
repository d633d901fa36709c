"""The optimizer: Adam, its schedule, and which parameters decay."""

import dataclasses
from typing import Any

import jax
import optax

from paligemma_jax.errors import ConfigError


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
