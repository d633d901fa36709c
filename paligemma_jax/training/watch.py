"""What is measured and told while a model is tuned: settings to a rule of validation."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.api import PaliGemma
from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation import METRICS, Metric
from paligemma_jax.evaluation.evaluate import spread
from paligemma_jax.files import recover_folder, replacing_folder
from paligemma_jax.training.data import Example
from paligemma_jax.training.held_out import HeldOut
from paligemma_jax.training.logs import kinds
from paligemma_jax.training.optimizer import averaged
from paligemma_jax.training.step import TrainState
from paligemma_jax.training.validation import Validation

BEST = "best"  # the folder of the best model so far, in the run's own

Params = Any


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is measured on what, and told where; configs/finetune.py says what the fields mean."""

    val_data: str = ""
    val_every: int = 0
    val_examples: int = 256
    metric: str = "exact"
    patience: int = 0
    keep_best: bool = True
    log: str = ""

    def __post_init__(self):
        for name in ("val_every", "val_examples", "patience"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name}={value} is not possible: give an integer of at least 0")
        if self.patience and not self.val_data:
            raise ConfigError(f"patience={self.patience} needs examples to validate on: give val_data too")
        kinds(self.log)
        metric_named(self.metric)


def metric_named(name: str) -> Metric | None:
    """The metric of a config key, None for ""; ConfigError for an unknown one."""
    if name and name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1) or [", ".join(METRICS)]
        raise ConfigError(f"metric={name!r} is not possible: give {close[0]}, or nothing for the loss alone")
    return METRICS[name] if name else None


def make_validation(
    watch: Watch,
    model: PaliGemma,
    held_out: Sequence[Example],
    batch_size: int,
    steps_per_epoch: int,
    output: Path,
    whole: Callable[[Params], Params],
    save: Callable[[Params, Path], None],
) -> Validation | None:
    """The validation of a run, or None without `val_data`.

    Args:
      held_out: the examples of `val_data`.
      model: its geometry, processor and programs are used.
      output: the directory of the run, where `best` is kept.
      whole: what trains to the parameters of the whole network.
      save: writes a model, of what trains, into an empty folder.

    Raises:
      DataError: from the examples.
    """
    if not watch.val_data:
        return None
    examples = spread(held_out, watch.val_examples)
    measured = HeldOut(model, examples, metric_named(watch.metric), batch_size)

    def keep(state: TrainState) -> None:
        with replacing_folder(output / BEST) as folder:
            save(averaged(state), folder)

    return Validation(
        lambda state, check: measured(whole(averaged(state)), check),
        watch.val_every or max(steps_per_epoch, 1),
        f"val_{watch.metric}" if watch.metric else "",
        watch.patience,
        keep if watch.keep_best else None,
    )


def recover(output: Path) -> None:
    """Mend what a killed run left of its best model."""
    recover_folder(output / BEST)
