"""What is told of a run while it trains."""

import concurrent.futures
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from paligemma_jax.errors import NumericsError
from paligemma_jax.training.logs import Logger

_ESTIMATED = 20  # steps of a run for which an estimate is worth a line


@dataclasses.dataclass
class _Step:
    """Metrics of a step; when its batch was asked for, when that was ready, and when the step was done.

    Times are those of `time.perf_counter`.
    """

    metrics: dict[str, Any]
    asked: float = 0.0
    ready: float = 0.0
    done: "concurrent.futures.Future[float] | None" = None

    def numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.metrics.items()}


class History:
    """Metrics of the steps since the last report.

    Args:
      step: the steps that are done.
      pending: metrics of the last of these, which no report had told yet.
      num_examples: of a step; 0 tells speed in steps.
      learning_rate: of a step that is to come.
    """

    def __init__(
        self,
        name: str,
        step: int,
        num_steps: int,
        loggers: Sequence[Logger],
        explain: Callable[[int], str],
        pending: Sequence[dict[str, float]] = (),
        num_examples: int = 0,
        learning_rate: Callable[[int], float] | None = None,
    ):
        self.step, self._first = step, step
        self._name, self._num_steps, self._loggers, self._explain = name, num_steps, loggers, explain
        self._num_examples, self._learning_rate = num_examples, learning_rate
        self._watch = concurrent.futures.ThreadPoolExecutor(1, "done")
        self._early: list[_Step] = []  # the first three steps, which an estimate is made of
        self._restart()
        self._steps = [_Step(metrics) for metrics in pending]

    def close(self) -> None:
        self._watch.shutdown()

    def _restart(self) -> None:
        self._steps: list[_Step] = []
        self._started = time.perf_counter()
        self._aside = 0.0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is no part of the steps: validation, saving."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def add(self, metrics: dict[str, jax.Array], asked: float, ready: float) -> None:
        """Metrics of one more step, which may not be done yet, and when its batch was asked for and when ready."""
        self.step += 1
        self._steps.append(_Step(metrics, asked, ready, self._watch.submit(_when_done, metrics)))
        if len(self._early) < 3:
            self._early.append(self._steps[-1])
            if len(self._early) == 3 and self._num_steps - self._first >= _ESTIMATED:
                self._estimate()

    def _estimate(self) -> None:
        """Tell how long the run takes, by the second and the third step: the first one compiles."""
        took = (self._early[2].done.result() - self._early[0].done.result()) / 2
        left = took * (self._num_steps - self.step)
        print(f"{self._name}: {took:.2g} s a step, about {_span(left)} for all that are left", file=sys.stderr)

    def pending(self) -> list[dict[str, float]]:
        """What `pending` takes when the run goes on."""
        return [step.numbers() for step in self._steps]

    def check_finite(self) -> None:
        """Raise NumericsError if the loss or gradient of a step since the last report is not finite."""
        for step, one in enumerate(self._steps, self.step - len(self._steps) + 1):
            if not (math.isfinite(one.metrics["loss"]) and math.isfinite(one.metrics["grad_norm"])):
                raise NumericsError(
                    f"{self._name} failed at step {step}: loss {float(one.metrics['loss']):g}, gradient "
                    f"{float(one.metrics['grad_norm']):g}; {self._explain(step - 1) or 'give a lower learning_rate'}"
                )

    def _waited(self, steps: Sequence[_Step]) -> float:
        """Seconds in which the device had nothing to do, as the next batch was not ready."""
        waited, free = 0.0, self._started
        for step in steps:
            waited += max(0.0, step.ready - max(free, step.asked))
            free = step.done.result()
        return waited

    def report(self) -> None:
        """Tell the means, and start anew."""
        self.check_finite()
        steps = [step.numbers() for step in self._steps]
        names = sorted(steps[0], key=lambda name: (name != "loss", name))  # the loss first
        means = {name: math.fsum(step[name] for step in steps) / len(steps) for name in names}
        if self._learning_rate is not None:
            means["learning_rate"] = float(self._learning_rate(self.step - 1))
        timed = [step for step in self._steps if step.done is not None]
        waited = self._waited(timed)
        took = max(time.perf_counter() - self._started - self._aside, 1e-9)
        speed, wait, share = len(timed) / took, 1000 * waited / max(len(timed), 1), min(waited / took, 1.0)
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
        pace = f"{speed * self._num_examples:.3g} examples/s" if self._num_examples else f"{speed:.2f} steps/s"
        left = _span((self._num_steps - self.step) / speed) if speed else "?"
        print(
            f"{self._name} {self.step}/{self._num_steps}  {numbers}  {pace}  data wait {wait:.3g} ms ({share:.0%})  "
            f"{left} left",
            file=sys.stderr,
        )
        times = {"steps_per_second": speed, "data_wait_ms": wait, "data_wait_share": share}
        self.log(times | means | ({"examples_per_second": speed * self._num_examples} if self._num_examples else {}))
        self._restart()

    def log(self, numbers: dict[str, float]) -> None:
        """Give numbers of this step to the loggers."""
        for logger in self._loggers:
            logger.numbers(self.step, numbers)


def _when_done(metrics: dict[str, jax.Array]) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


def _span(seconds: float) -> str:
    """A time in words: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
