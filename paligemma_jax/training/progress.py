"""What is told of a run while it trains."""

import math
import sys
import time
from collections.abc import Callable

import jax

from paligemma_jax.errors import NumericsError


class History:
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
