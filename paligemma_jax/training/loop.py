"""The training loop: state in, state out, a batch for each step number.

Batches are a function of the step alone, so a run that was stopped goes on exactly where it was.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from paligemma_jax import ops
from paligemma_jax.errors import CheckpointError, NumericsError, UserError

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


def make_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> StepFn:
    """A jitted update with the old state donated; the metrics gain `loss` and `grad_norm`.

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

    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options())


def _compiler_options() -> dict[str, str]:
    # On CPU XLA's YNNPACK matmuls are slower in training than the ones they replace.
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if ops.Target.detect().platform == "cpu" else {}


def open_checkpoints(directory: str | Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """Orbax checkpoints of a run in a directory, made if it is not there."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=handler)


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest saved state, or the given one when nothing was saved yet.

    Raises:
      CheckpointError: the saved state has other parameters or another optimizer than `state`.
    """
    step = manager.latest_step()
    if step is None:
        return state
    # Looked at first: a restore that fails half way leaves reads behind that nobody waits for.
    saved = {leaf.name: tuple(leaf.shape) for leaf in jax.tree.leaves(manager.item_metadata(step).tree)}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    if saved != {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}:
        raise CheckpointError(
            f"{manager.directory} holds a training state of another model: give another output_dir, or remove it"
        )
    return manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_abstract, state)))


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def fit(
    state: TrainState,
    step_fn: StepFn,
    batch_at: Callable[[int], Tree],
    num_steps: int,
    *,
    checkpoints: ocp.CheckpointManager | None = None,
    save_every: int = 500,
    save_minutes: float = math.inf,
    log_every: int = 50,
    name: str = "train",
    log: Callable[[dict[str, float]], None] | None = None,
    explain: Callable[[Tree, Tree], str] | None = None,
    evaluate: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """Train to `num_steps`, resuming from `checkpoints` if any; returns the last state.

    `batch_at(step)` gives the batch of a step; the next one is prepared while a step runs. Every `log_every` steps a
    line with the means since the last one goes to stderr, and to `log` as numbers. The state is saved every
    `save_every` steps, and whenever `save_minutes` have passed since. `explain(params, batch)` says why a loss is not
    finite. `evaluate(state)` is called every `save_every` steps, before they are saved; training goes on with the state
    that it returns, such as one with another learning rate. Ctrl-C, and a batch that cannot be had, save before they
    stop the run.

    Raises:
      NumericsError: the loss is not finite any more; what led there is not saved.
      CheckpointError: see `restore`.
      UserError: from `batch_at`.
    """
    if checkpoints is not None:
        state = restore(checkpoints, state)
    first = int(state.step)
    if first:
        print(f"{name} goes on from step {first} of {num_steps}", file=sys.stderr)
    history = _History(
        name, first, num_steps, log, lambda step: explain(state.params, batch_at(step)) if explain else ""
    )

    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        history.check_finite()
        saved = time.monotonic()
        if checkpoints is not None and history.step > (checkpoints.latest_step() or 0):
            checkpoints.save(history.step, args=ocp.args.StandardSave(state))

    with _prefetched(batch_at, range(first, num_steps)) as batches, _held_interrupts() as interrupted:
        while history.step < num_steps:
            try:
                if interrupted():
                    raise KeyboardInterrupt
                batch = next(batches)
            except (KeyboardInterrupt, UserError):
                save()
                raise
            state, metrics = step_fn(state, batch)
            history.add(metrics)
            is_last = history.step == num_steps
            if is_last or history.step % log_every == 0:
                history.report()
            if evaluate is not None and history.step % save_every == 0:
                history.check_finite()
                state = evaluate(state)
            if is_last or history.step % save_every == 0 or time.monotonic() - saved > 60 * save_minutes:
                save()
    return state


class _History:
    """Metrics of the steps since the last report."""

    def __init__(
        self,
        name: str,
        step: int,
        num_steps: int,
        log: Callable[[dict[str, float]], None] | None,
        explain: Callable[[int], str],
    ):
        self.step = step
        self._name, self._num_steps, self._log, self._explain = name, num_steps, log, explain
        self._restart()

    def _restart(self) -> None:
        self._metrics: list[dict[str, jax.Array]] = []
        self._started = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self.step += 1
        self._metrics.append(metrics)

    def check_finite(self) -> None:
        """Raise NumericsError if the loss or gradient of a step since the last report is not finite."""
        for step, metrics in enumerate(self._metrics, self.step - len(self._metrics) + 1):
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                raise NumericsError(
                    f"{self._name} failed at step {step}: loss {float(metrics['loss']):g}, gradient "
                    f"{float(metrics['grad_norm']):g}; {self._explain(step - 1) or 'give a lower learning_rate'}"
                )

    def report(self) -> None:
        """Print the means and start anew."""
        self.check_finite()
        count = len(self._metrics)
        names = sorted(self._metrics[0], key=lambda name: (name != "loss", name))  # the loss first
        means = {name: float(sum(m[name] for m in self._metrics)) / count for name in names}
        speed = count / (time.perf_counter() - self._started)
        left = (self._num_steps - self.step) / speed / 60
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
        print(
            f"{self._name} {self.step}/{self._num_steps}  {numbers}  {speed:.2f} steps/s  {left:.0f} min left",
            file=sys.stderr,
        )
        if self._log is not None:
            self._log({"step": self.step, "steps_per_second": speed, **means})
        self._restart()


@contextlib.contextmanager
def _prefetched(batch_at: Callable[[int], Tree], steps: range) -> Iterator[Iterator[Tree]]:
    """The batches of some steps, each prepared while the one before is used."""

    def batches() -> Iterator[Tree]:
        upcoming = pool.submit(batch_at, steps[0])
        for step in steps[1:]:
            batch, upcoming = upcoming.result(), pool.submit(batch_at, step)
            yield batch
        yield upcoming.result()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield batches()


@contextlib.contextmanager
def _held_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until it is asked for: in the middle of a step the old state is gone and the new one not yet here.

    A second one stops at once.
    """
    held = threading.Event()

    def hold(signum: int, frame: object) -> None:
        if held.is_set():
            raise KeyboardInterrupt
        held.set()
        print("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # signals are handled there only
        yield held.is_set
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield held.is_set
    finally:
        signal.signal(signal.SIGINT, before)
