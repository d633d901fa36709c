"""When held-out examples are measured, which measurement is the best, and when training is over early."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from paligemma_jax.training.samples import Sample
from paligemma_jax.training.step import TrainState

Record = dict[str, Any]  # a measurement: "step", and numbers whose names begin with "val_"; plain JSON values
Check = Callable[[], None]  # raises when the run is to stop


@dataclasses.dataclass(frozen=True)
class Validation:
    """A rule of validation. All that it decides is a function of the records so far, so that a run can be resumed.

    run: the state of a step to numbers of the held-out examples, and some answers; it calls what it is given now and
      then, which raises when the run is to stop.
    every: steps between measurements, which are made before the first and after the last step too.
    metric: the number that says which is best: the largest, of equal ones that with the smallest `val_loss`; "" goes
      by the loss alone. NaN is never best.
    patience: measurements without a better one after which training ends; 0 never ends it.
    keep: called with the state of each measurement that is the best so far, before the next step.
    """

    run: Callable[[TrainState, Check], tuple[dict[str, float], Sequence[Sample]]]
    every: int
    metric: str = ""
    patience: int = 0
    keep: Callable[[TrainState], None] | None = None

    def measure(self, step: int, state: TrainState, check: Check) -> tuple[Record, Sequence[Sample]]:
        values, samples = self.run(state, check)
        return {"step": step, **values}, samples

    def is_due(self, step: int, num_steps: int, records: Sequence[Record]) -> bool:
        """Whether a step is to be measured and was not yet."""
        if self.is_over(records):
            return False
        return (step % self.every == 0 or step >= num_steps) and all(record["step"] != step for record in records)

    def is_best(self, record: Record, records: Sequence[Record]) -> bool:
        """Whether a measurement is better than all before."""
        best = self.best([*records, record])
        return best is record

    def best(self, records: Sequence[Record]) -> Record | None:
        """The first of the best measurements; None without any."""
        able = [record for record in records if not any(map(math.isnan, self._score(record)))]
        return max(able, key=self._score, default=None)

    def is_over(self, records: Sequence[Record]) -> bool:
        """Whether training ends early."""
        best = self.best(records)
        since = sum(best is None or record["step"] > best["step"] for record in records)
        return 0 < self.patience <= since

    def told(self, record: Record) -> str:
        """A measurement in a line."""
        return "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")

    def summary(self, records: Sequence[Record], num_steps: int) -> str:
        """How it ended."""
        best = self.best(records)
        early = f"none of the last {self.patience} validations was better, so training ended early; "
        early = early if self.is_over(records) and records[-1]["step"] < num_steps else ""
        if best is None:
            return f"{early}no validation gave a number"
        return f"{early}best was step {best['step']} of {records[-1]['step']}: {self.told(best)}"

    def _score(self, record: Record) -> tuple[float, float]:
        return (record[self.metric] if self.metric else 0.0), -record["val_loss"]
