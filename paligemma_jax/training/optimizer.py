"""The optimizer: Adam, its schedule, which parameters decay or learn slower, and the average of the parameters."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from paligemma_jax.errors import ConfigError
from paligemma_jax.training.step import TrainState
from paligemma_jax.training.trainable import Names, labels, path_of, patterns_of

SCHEDULES = ("cosine", "linear", "constant")
_INFINITY = float("inf")
_LIMITS = {
    "learning_rate": (0.0, _INFINITY),
    "weight_decay": (0.0, 1.0),
    "b1": (0.0, 1.0),
    "b2": (0.0, 1.0),
    "clip_norm": (0.0, _INFINITY),
    "warmup_fraction": (0.0, 1.0),
    "label_smoothing": (0.0, 1.0),
    "dropout": (0.0, 1.0),
    "ema": (0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimizer and loss settings; the defaults are big_vision's for a data set of one's own.

    `weight_decay` is per step: it follows the schedule, and is multiplied by no learning rate. `decayed` and
    `lr_multipliers` are patterns, see `training.trainable`; the comments of configs/finetune.py say more.
    """

    learning_rate: float = 1e-5
    weight_decay: float = 3e-7
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    schedule: str = "cosine"
    warmup_fraction: float = 0.05
    decayed: str = ""
    lr_multipliers: str = ""
    label_smoothing: float = 0.0
    dropout: float = 0.0
    ema: float = 0.0

    def __post_init__(self):
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value < high:
                raise ConfigError(f"{name}={value} is not possible: give a number from {low:g} to below {high:g}")
        if not self.clip_norm:  # nothing would train
            raise ConfigError(
                f"clip_norm={self.clip_norm} is not possible: give a number above 0, a large one for no clipping"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is not possible: give {', '.join(SCHEDULES)}")
        _ = self.multipliers

    @property
    def multipliers(self) -> list[tuple[str, float]]:
        """The patterns of `lr_multipliers` with their numbers; ConfigError when one is not so, or not above 0."""
        rules = []
        for part in patterns_of(self.lr_multipliers):
            pattern, _, number = part.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                value = 0.0
            if not pattern or not 0 < value < _INFINITY:
                raise ConfigError(f"lr_multipliers: {part!r} is not possible: give PATTERN=NUMBER, a number above 0")
            rules.append((pattern, value))
        return rules


def make_schedule(recipe: Recipe, num_steps: int) -> optax.Schedule:
    """The step to the height of the schedule, 0 to 1: a linear warm-up, then a cosine or a line to 0, or 1."""
    warmup = round(recipe.warmup_fraction * num_steps)
    rest = max(num_steps - warmup, 1)
    falling = {
        "cosine": lambda: optax.cosine_decay_schedule(1.0, rest),
        "linear": lambda: optax.linear_schedule(1.0, 0.0, rest),
        "constant": lambda: optax.constant_schedule(1.0),
    }[recipe.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), falling], [warmup]) if warmup else falling


def make_optimizer(recipe: Recipe, num_steps: int, names: Names | None = None) -> optax.GradientTransformation:
    """Adam over the parameters that it is given, which are those that train: clipping is over these alone.

    Args:
      names: all names of the parameters, which patterns may mean; by default their paths alone.

    Raises:
      ConfigError: from its `init`, when a pattern matches no parameter, or `lr_multipliers` leave one out.
    """
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.scale_by_adam(b1=recipe.b1, b2=recipe.b2),
        _scale_by_learning_rate(recipe, names),
        _add_decay(recipe, names),
        optax.scale_by_schedule(make_schedule(recipe, num_steps)),
        optax.scale(-1.0),
        *([_average(recipe.ema)] if recipe.ema else []),
    )


def _scale_by_learning_rate(recipe: Recipe, names: Names | None) -> optax.GradientTransformation:
    rules = recipe.multipliers

    def rates(params: Any) -> Any:
        factors = labels(params, rules, names=names) if rules else jax.tree.map(lambda _: 1.0, params)
        return jax.tree.map(lambda factor: recipe.learning_rate * factor, factors)

    def init(params: Any) -> optax.EmptyState:
        rates(params)  # they are checked before the first step
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda rate, value: rate * value, rates(updates), updates), state

    return optax.GradientTransformation(init, update)


def _add_decay(recipe: Recipe, names: Names | None) -> optax.GradientTransformation:
    rules = [(pattern, True) for pattern in patterns_of(recipe.decayed)]
    mask = functools.partial(labels, rules=rules, default=False, names=names) if rules else _picture_kernels
    return optax.add_decayed_weights(recipe.weight_decay, mask)


def _picture_kernels(params: Any) -> Any:
    """True for the kernels of image encoder and projector."""

    def is_kernel(path: tuple[Any, ...], value: jax.Array) -> bool:
        names = path_of(path).split("/")
        picture_side = names[0] in ("vision_tower", "multi_modal_projector")
        return picture_side and value.ndim > 1 and names[-2] != "position_embedding"

    return jax.tree_util.tree_map_with_path(is_kernel, params)


class _Average(NamedTuple):
    """Exponential moving average of the parameters, float32."""

    count: jax.Array
    params: Any


def _average(decay: float) -> optax.GradientTransformation:
    """The last link of a chain: passes updates on, and averages what the parameters become.

    The first steps weigh more, as min(decay, (1 + t) / (10 + t)), or a short run would end at its beginning.
    """

    def init(params: Any) -> _Average:
        return _Average(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.array(x, jnp.float32), params))

    def update(updates: Any, state: _Average, params: Any) -> tuple[Any, _Average]:
        kept = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, x: kept * old + (1 - kept) * x.astype(jnp.float32), state.params, new)
        return updates, _Average(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged(state: TrainState) -> Any:
    """The parameters to evaluate and save: their average, in their own dtype, where the optimizer keeps one."""
    found = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_average) if _is_average(x)]
    if not found:
        return state.params
    return jax.tree.map(lambda average, x: average.astype(x.dtype), found[0].params, state.params)


def _is_average(x: Any) -> bool:
    return isinstance(x, _Average)
