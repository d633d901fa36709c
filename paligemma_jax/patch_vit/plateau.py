"""AdamW whose learning rate falls when the validation loss does not, as torch's AdamW with ReduceLROnPlateau."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from paligemma_jax.errors import ConfigError

_LEAST_CHANGE = 1e-8  # of the learning rate, as in torch


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimizer settings; the defaults are the original's.

    plateau_factor: what the learning rate is multiplied by, after more than `plateau_patience` validations in a row
      that were not better than the best by the share `plateau_threshold`; `min_learning_rate` is the least.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    plateau_factor: float = 0.5
    plateau_patience: int = 1
    plateau_threshold: float = 1e-3
    min_learning_rate: float = 1e-6

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} is not possible: give a number of at least 0")
        if not 0 < self.plateau_factor <= 1:
            raise ConfigError(
                f"plateau_factor={self.plateau_factor} is not possible: give a number above 0 and up to 1"
            )


class PlateauState(NamedTuple):
    """State of the optimizer with what the schedule remembers."""

    adam: optax.OptState
    learning_rate: jax.Array  # f32 []
    best: jax.Array  # f32 [], the lowest validation loss
    bad: jax.Array  # i32 [], validations in a row that were no better


def make_optimizer(recipe: Recipe, trained: Callable[[Any], Any]) -> optax.GradientTransformation:
    """AdamW on the parameters where `trained(params)`, a tree of booleans, says so; the others stay as they are."""
    adamw = optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.add_decayed_weights(recipe.weight_decay))

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda is_trained: "trained" if is_trained else "fixed", trained(params))

    inner = optax.partition({"trained": adamw, "fixed": optax.set_to_zero()}, labels)

    def init(params: Any) -> PlateauState:
        rate = jnp.asarray(recipe.learning_rate, jnp.float32)
        return PlateauState(inner.init(params), rate, jnp.asarray(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))

    def update(grads: Any, state: PlateauState, params: Any = None) -> tuple[Any, PlateauState]:
        updates, adam = inner.update(grads, state.adam, params)
        return jax.tree.map(lambda u: -state.learning_rate * u, updates), state._replace(adam=adam)

    return optax.GradientTransformation(init, update)


def after_validation(recipe: Recipe, state: PlateauState, loss: jax.Array) -> PlateauState:
    """The state after a validation with this loss."""
    loss = jnp.asarray(loss, jnp.float32)
    better = loss < state.best * (1 - recipe.plateau_threshold)
    bad = jnp.where(better, 0, state.bad + 1)
    due = bad > recipe.plateau_patience
    lower = jnp.maximum(state.learning_rate * recipe.plateau_factor, recipe.min_learning_rate)
    changes = due & (state.learning_rate - lower > _LEAST_CHANGE)
    return state._replace(
        learning_rate=jnp.where(changes, lower, state.learning_rate),
        best=jnp.where(better, loss, state.best),
        bad=jnp.where(due, 0, bad),
    )
