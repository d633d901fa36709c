"""The training loop: state in, state out, a batch for each step number.

Batches are a function of the step alone, so a run that was stopped goes on exactly where it was.
"""

import concurrent.futures
import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import orbax.checkpoint as ocp

from paligemma_jax.errors import UserError
from paligemma_jax.training.checkpoints import restore
from paligemma_jax.training.progress import History
from paligemma_jax.training.step import StepFn, TrainState, Tree


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
    history = History(
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
