"""One step of training: state in, state out."""

import contextlib
import ctypes
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
    """Everything a run needs to go on: step number, parameters that train (float32) and optimizer state."""

    step: jax.Array
    params: Tree
    opt_state: optax.OptState


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


class Step:
    """A jitted update (state, batch) -> (state, metrics); the old state is donated, what is frozen is not."""

    def __init__(self, update: Callable[..., Any], frozen: Tree, out_shardings: Any = None):
        placed = {} if out_shardings is None else {"out_shardings": out_shardings}
        self._jitted = jax.jit(update, donate_argnums=0, compiler_options=_compiler_options(), **placed)
        self._run: Callable[..., Any] = self._jitted
        self.update, self.frozen = update, frozen

    def __call__(self, state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._run(state, self.frozen, batch)

    def compile(self, state: TrainState, batch: Tree) -> jax.stages.Compiled:
        """The program for a state and batches like these, which later calls then run: batches of other shapes fail."""
        self._run = compiled = self._jitted.lower(state, self.frozen, batch).compile()
        _trim_heap()
        return compiled


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    frozen: Tree = None,
    join: Callable[[Tree, Tree], Tree] | None = None,
    accumulate: int = 1,
    out_shardings: Any = None,
) -> Step:
    """The update of a training; the metrics gain `loss` and `grad_norm`.

    Where one of those is not finite, parameters and optimizer state stay as they were.

    Args:
      loss_fn: (params, batch) -> loss, metrics; means over the rows of a batch.
      frozen: what does not train, an argument of the program that it neither changes nor copies.
      join: (state.params, frozen) -> the params of `loss_fn`; by default they are `state.params`.
      accumulate: micro-batches of a batch, whose arrays have them as their first axis: gradients and metrics are their
        means.
      out_shardings: of the state and of the metrics on several devices (`parallel.step_shardings`).
    """

    def gradients(params: Tree, frozen: Tree, batch: Tree) -> tuple[Any, Tree]:
        def loss(params: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_fn(params if join is None else join(params, frozen), batch)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def mean_gradients(params: Tree, frozen: Tree, batch: Tree) -> tuple[Any, Tree]:
        if accumulate == 1:
            return gradients(params, frozen, batch)

        def add(total: Any, micro: Tree) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, frozen, micro)), None

        like = jax.eval_shape(gradients, params, frozen, jax.tree.map(lambda x: x[0], batch))
        total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), batch)
        return jax.tree.map(lambda x: x / accumulate, total)

    def update(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), grads = mean_gradients(state.params, frozen, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)  # else all stays as it is, so that the cause can be found
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        return TrainState(state.step + 1, *kept), {"loss": loss, **metrics, "grad_norm": norm}

    return Step(update, frozen, out_shardings)


def _trim_heap() -> None:
    """Give back what compiling has freed, which glibc keeps: a third of a gigabyte for a small model."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _compiler_options() -> dict[str, str]:
    # On CPU XLA's YNNPACK matmuls are slower in training than the ones they replace.
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if ops.Target.detect().platform == "cpu" else {}
