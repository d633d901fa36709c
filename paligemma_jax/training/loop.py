"""The training loop: state in, state out, a batch for each step number.

Batches are a function of the step alone, so a run that was stopped goes on exactly where it was. What else decides how
it goes on, the validations so far and the metrics since the last report, is in the same checkpoint as the state.
"""

import concurrent.futures
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import orbax.checkpoint as ocp

from paligemma_jax.errors import NumericsError, UserError
from paligemma_jax.training.checkpoints import restore, save, saved_notes
from paligemma_jax.training.logs import Logger
from paligemma_jax.training.parallel import largest
from paligemma_jax.training.progress import History
from paligemma_jax.training.signals import held_signals
from paligemma_jax.training.step import StepFn, TrainState, Tree
from paligemma_jax.training.validation import Record, Validation


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
    loggers: Sequence[Logger] = (),
    explain: Callable[[Tree, Tree], str] | None = None,
    evaluate: Callable[[TrainState], TrainState] | None = None,
    validation: Validation | None = None,
    num_examples: int = 0,
    learning_rate: Callable[[int], float] | None = None,
) -> TrainState:
    """Train to `num_steps`, resuming from `checkpoints` if any; returns the last state.

    `batch_at(step)` gives the batch of a step; the next one is prepared while a step runs. Every `log_every` steps a
    line with the means since the last one goes to stderr, and to `loggers` as numbers. The state is saved every
    `save_every` steps, and whenever `save_minutes` have passed since. `explain(params, batch)` says why a loss is not
    finite. `evaluate(state)` is called every `save_every` steps, before they are saved; training goes on with the state
    that it returns, such as one with another learning rate. `validation` measures held-out examples before the first
    step, at its intervals and after the last, and may end training early. `num_examples` of a batch and the
    `learning_rate` of a step are told with the rest. Ctrl-C, SIGTERM and a batch that cannot be had save before they
    stop the run. Several processes agree on signals and time when a line is due; what stops one alone is not saved.

    Raises:
      NumericsError: the loss is not finite any more; what led there is not saved.
      CheckpointError: see `restore`.
      UserError: from `batch_at`, and from `validation`.
      Stopped: SIGTERM.
    """
    notes = {}
    if checkpoints is not None:
        state, notes = restore(checkpoints, state), saved_notes(checkpoints)
    first = int(state.step)
    if first:
        print(f"{name} goes on from step {first} of {num_steps}", file=sys.stderr)
    records: list[Record] = list(notes.get("validations", ()))
    history = History(
        name,
        first,
        num_steps,
        loggers,
        lambda step: explain(state.params, batch_at(step)) if explain else "",
        notes.get("pending", ()),
        num_examples,
        learning_rate,
    )
    for logger in loggers:
        logger.start(first, any(record["step"] == first for record in records))

    saved, is_alone = time.monotonic(), jax.process_count() == 1

    def is_late() -> bool:
        return bool(largest(time.monotonic() - saved > 60 * save_minutes))

    def save_state() -> None:
        nonlocal saved
        history.check_finite()
        saved = time.monotonic()
        if checkpoints is not None and history.step > (checkpoints.latest_step() or 0):
            with history.aside():
                save(checkpoints, history.step, state, {"validations": records, "pending": history.pending()})

    def stop_if_asked() -> None:
        try:
            check()
        except KeyboardInterrupt:
            save_state()
            raise

    def validate(check: Callable[[], None]) -> None:
        history.check_finite()
        with history.aside():
            record, samples = validation.measure(history.step, state, check)
        history.log({name: value for name, value in record.items() if name != "step"})
        for logger in loggers:
            logger.samples(history.step, samples)
        is_best = validation.is_best(record, records)
        if is_best and validation.keep is not None:
            with history.aside():
                validation.keep(state)
        records.append(record)
        print(
            f"{name} {history.step}/{num_steps}  {validation.told(record)}{'  best so far' * is_best}", file=sys.stderr
        )

    with (
        contextlib.ExitStack() as stack,
        _prefetched(batch_at, range(first, num_steps)) as batches,
        held_signals(largest) as check,
    ):
        for thing in (history, *loggers):
            stack.callback(thing.close)
        while True:
            try:
                if validation is not None and validation.is_due(history.step, num_steps, records):
                    validate(check)
                is_over = validation is not None and validation.is_over(records)
                is_last = history.step >= num_steps or is_over
                together = is_alone or history.step % log_every == 0  # clocks and signals differ, saving takes all
                if is_last or history.step % save_every == 0 or (together and is_late()):
                    save_state()
                if is_last:
                    break
                if together:
                    stop_if_asked()
                asked = time.perf_counter()
                batch, ready = next(batches)
            except NumericsError:
                raise
            except (KeyboardInterrupt, UserError) as error:
                if is_alone:
                    save_state()
                if is_alone and checkpoints is not None and isinstance(error, KeyboardInterrupt):
                    print(f"{name} stopped at step {history.step} of {num_steps}; its state is saved", file=sys.stderr)
                raise
            state, metrics = step_fn(state, batch)
            history.add(metrics, asked, ready)
            if history.step == num_steps or history.step % log_every == 0:
                history.report()
            if evaluate is not None and history.step % save_every == 0:
                history.check_finite()
                with history.aside():
                    state = evaluate(state)
    if validation is not None:
        print(f"{name}: {validation.summary(records, num_steps)}", file=sys.stderr)
    return state


@contextlib.contextmanager
def _prefetched(batch_at: Callable[[int], Tree], steps: range) -> Iterator[Iterator[tuple[Tree, float]]]:
    """The batches of some steps, each prepared while the one before is used, and when each was ready."""

    def prepare(step: int) -> tuple[Tree, float]:
        return batch_at(step), time.perf_counter()

    def batches(upcoming: "concurrent.futures.Future[tuple[Tree, float]]") -> Iterator[tuple[Tree, float]]:
        for step in steps[1:]:
            batch, upcoming = upcoming.result(), pool.submit(prepare, step)
            yield batch
        yield upcoming.result()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield batches(pool.submit(prepare, steps[0])) if steps else iter(())
