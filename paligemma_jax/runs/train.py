"""config.run=train: fine-tune on your own pictures."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.annotate import fingerprint
from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.files import expanded, read_json, write_json
from paligemma_jax.runs import model as models
from paligemma_jax.runs import settings
from paligemma_jax.runs.answers_check import compare_answers
from paligemma_jax.runs.folder import make_folder
from paligemma_jax.runs.notes import note
from paligemma_jax.training import data
from paligemma_jax.training.finetune import Settings, finetune
from paligemma_jax.training.methods import LEARNING_RATES, Method
from paligemma_jax.training.optimizer import Recipe
from paligemma_jax.training.parallel import is_first
from paligemma_jax.training.watch import Watch

_RUN, _CHECKPOINTS = "training.json", "checkpoints"
_RESULTS = ("adapter", "best", "samples", "tensorboard", "wandb")  # folders beside the model
_CHOICE = "name another output_dir, or add overwrite=True to begin anew"


def run(config: ConfigDict) -> int:
    """Train to the end, or to Ctrl-C or SIGTERM; the same command goes on from there."""
    if not config.data:
        raise DataError("no data is given: name a .jsonl file, or the folder of a data set, with --config.data=...")
    if not config.output_dir:
        raise ConfigError("output_dir is empty: name a folder for the tuned model")
    models.check_weights(config)
    config = config.copy_and_resolve_references()
    for key in ("image_root", "output_dir"):
        config[key] = str(expanded(config[key])) if config[key] else ""
    method = settings.from_config(Method, config)
    config.learning_rate = config.learning_rate or LEARNING_RATES[method.method]
    wanted, recipe, watch = (settings.from_config(kind, config) for kind in (Settings, Recipe, Watch))
    directory, fresh = Path(config.output_dir), _fingerprint(config, recipe, method)
    start = expanded(config.checkpoint)
    if start.exists() and start.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"checkpoint={config.checkpoint} lies in output_dir={directory}: name another output_dir")
    _check(directory, fresh, config.overwrite)
    if fresh["data"] == fresh["val_data"]:
        note("val_data has the same examples as data: how good the model is on new ones is not measured")
    finetune(wanted, recipe, functools.partial(_claim, directory, fresh, config.overwrite), method, watch)
    if not is_first():  # the model may not be written yet
        return 0
    note(f"wrote {directory}: use it with --config.checkpoint={directory}")
    if config.verify:
        note(compare_answers(directory))
    return 0


def _fingerprint(config: ConfigDict, recipe: Recipe, method: Method) -> dict[str, Any]:
    """What the tuned weights depend on, and which of them are best."""
    keys = ("dtype", "image_root", "data_format", "data_task", "augment", "epochs", "batch_size", "text_length", "seed")
    keys += ("val_examples", "metric")
    found = {"data": data.fingerprint(config.data, data_format=config.data_format), "val_data": ""}
    if config.val_data:
        found["val_data"] = data.fingerprint(config.val_data, split="valid", data_format=config.data_format)
    weights = fingerprint.of_weights(config.checkpoint)
    chosen = {key: config[key] for key in keys} | dataclasses.asdict(recipe) | dataclasses.asdict(method)
    return {**found, "checkpoint": weights, **chosen}


def _check(directory: Path, fresh: dict[str, Any], overwrite: bool) -> None:
    """Make sure that a folder has this training or none.

    Raises:
      ConfigError: it has another one, or anything that did not come of a training.
    """
    known, steps = directory / _RUN, directory / _CHECKPOINTS
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"output_dir={directory} is a file: name a folder")
    before = read_json(known) if known.exists() else None
    if not isinstance(before, dict) or "data" not in before:
        if any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty, and holds no training: name another output_dir")
        return
    has_work = (steps.is_dir() and any(steps.iterdir())) or (directory / "model.safetensors").exists()
    if has_work and not overwrite and (changed := fingerprint.differences(before, fresh)):
        raise ConfigError(f"{directory} has another training, which differs in {fingerprint.named(changed)}: {_CHOICE}")


def _claim(directory: Path, fresh: dict[str, Any], overwrite: bool) -> None:
    """Make a folder that of this training, when nothing about data and model is wrong."""
    if not is_first():  # of several processes that share the folder
        return
    for name in (_CHECKPOINTS, *_RESULTS) if overwrite else ():
        if (old := directory / name).exists():
            shutil.rmtree(old.resolve())
    make_folder(directory)
    write_json(directory / _RUN, fresh)
