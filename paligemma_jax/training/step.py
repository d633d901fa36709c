"""One step of training: state in, state out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paligemma_jax import ops

Tree = Any
LossFn = Callable[[Tree, Tree], tuple[jax.Array, dict[str, jax.Array]]]  # (params, batch) -> loss, metrics
StepFn = Callable[["TrainState", Tree], tuple["TrainState", dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on: step number, parameters and optimizer state."""

    step: jax.Array
    params: Tree
    opt_state: optax.OptState


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, out_shardings: Any = None) -> StepFn:
    """A jitted update with the old state donated; the metrics gain `loss` and `grad_norm`.

    `out_shardings` are those of the state and of the metrics on several devices (`parallel.step_shardings`).
    Where one of those is not finite, parameters and optimizer state stay as they were.
    """

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)  # else all stays as it is, so that the cause can be found
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        return TrainState(state.step + 1, *kept), {"loss": loss, **metrics, "grad_norm": norm}

    placed = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options(), **placed)


def _compiler_options() -> dict[str, str]:
    # On CPU XLA's YNNPACK matmuls are slower in training than the ones they replace.
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if ops.Target.detect().platform == "cpu" else {}
