"""Where the numbers and the sample answers of a run go, beside the lines on stderr.

A run that is resumed at a step may have told of later ones before it was killed: `start` takes those back.
"""

import json
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import read_lines, write_text
from paligemma_jax.training.samples import Sample, to_html

KINDS = ("tensorboard", "wandb")


class Logger(Protocol):
    """Something that keeps what a run tells."""

    def start(self, step: int, validated: bool) -> None:
        """Training goes on from a step: drop what is known of later ones, and its validation if that is yet to come."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step by name; names beginning with `val_` are of the held-out examples."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Some held-out examples with their answers."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines:
    """`metrics.jsonl`: an object a line, with its step."""

    def __init__(self, file: Path):
        self._file = file

    def start(self, step: int, validated: bool) -> None:
        if not self._file.exists():
            return
        kept = [line for line in read_lines(self._file) if _is_before(line, step, validated)]
        write_text(self._file, "".join(f"{line}\n" for line in kept))

    def numbers(self, step: int, values: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        pass

    def close(self) -> None:
        pass


def _is_before(line: str, step: int, validated: bool) -> bool:
    """Whether a line is whole and tells nothing that is told again."""
    try:
        values = json.loads(line)
        found = int(values["step"])
    except (ValueError, KeyError, TypeError):
        return False
    return found < step or (found == step and (validated or not any(name.startswith("val_") for name in values)))


class SamplePages:
    """A page for each validation: `step_000100.html` with pictures inside."""

    def __init__(self, folder: Path):
        self._folder = folder

    def start(self, step: int, validated: bool) -> None:
        for path in self._folder.glob("step_*.html"):
            number = path.stem.removeprefix("step_")
            if number.isdigit() and int(number) > step - (not validated):
                path.unlink()

    def numbers(self, step: int, values: dict[str, float]) -> None:
        pass

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / f"step_{step:06}.html", to_html(f"step {step}", samples))

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in a folder, which `tensorboard --logdir` shows; ConfigError when tensorboardX is missing."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise _missing("tensorboard", "tensorboardX") from None
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._writer: Any = None

    def start(self, step: int, validated: bool) -> None:
        self._writer = self._open(step)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(_tag(name), value, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            self._writer.add_image(f"samples/{number}", np.asarray(sample.drawn()), step, dataformats="HWC")
            self._writer.add_text(f"samples/{number}", sample.text(), step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases, in a folder; offline unless WANDB_MODE says otherwise.

    Raises:
      ConfigError: wandb is missing.
    """

    def __init__(self, folder: Path, name: str):
        try:
            import wandb
        except ModuleNotFoundError:
            raise _missing("wandb", "wandb") from None
        self._wandb, self._folder, self._name = wandb, folder, name
        self._run: Any = None

    def start(self, step: int, validated: bool) -> None:
        known = self._folder / "run_id"
        if step and known.exists():  # lines of later steps are refused there, as those of the run before stand already
            run_id = known.read_text(encoding="utf-8").strip()
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(known, run_id := uuid.uuid4().hex[:12])
        mode = os.environ.get("WANDB_MODE", "offline")
        settings = {"dir": str(self._folder), "id": run_id, "resume": "allow", "mode": mode, "name": self._name}
        self._run = self._wandb.init(project=os.environ.get("WANDB_PROJECT", "paligemma_jax"), **settings)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log({_tag(name): value for name, value in values.items()}, step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        pictures = [self._wandb.Image(sample.drawn(), caption=sample.text()) for sample in samples]
        self._run.log({"samples": pictures}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _tag(name: str) -> str:
    """Names as both show them in groups: train/loss, val/loss."""
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def _missing(kind: str, package: str) -> ConfigError:
    return ConfigError(f'log={kind} needs {package}: pip install -e ".[{kind}]", or leave log out')


def kinds(log: str) -> list[str]:
    """The kinds of a config value such as "tensorboard ; wandb"; ConfigError for others."""
    names = list(dict.fromkeys(name.strip() for name in log.split(";") if name.strip()))
    if strange := next((name for name in names if name not in KINDS), None):
        raise ConfigError(f"log={log!r} is not possible: {strange!r} is not one of {', '.join(KINDS)}")
    return names


def make_loggers(output: Path, log: str = "") -> list[Logger]:
    """Those of a run that writes into a directory: `metrics.jsonl` and `samples/` always, others as asked for.

    Nothing is written before their `start`.

    Raises:
      ConfigError: `log` names what is unknown or not installed.
    """
    made: list[Logger] = [JsonLines(output / "metrics.jsonl"), SamplePages(output / "samples")]
    for kind in kinds(log):
        made.append(TensorBoard(output / kind) if kind == "tensorboard" else Wandb(output / kind, output.name))
    return made
