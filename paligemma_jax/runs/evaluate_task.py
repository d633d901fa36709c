"""config.run=evaluate with a task: how good a model is on a data set of the field, from its public files."""

import contextlib
import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

import paligemma_jax as pj
from paligemma_jax.annotate import fingerprint
from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.evaluation.evaluate import Evaluation, check, needs_masks, prompt_of, spread, summarize
from paligemma_jax.evaluation.examples import Example
from paligemma_jax.evaluation.metrics import METRICS
from paligemma_jax.evaluation.tasks import TASKS, Task, read
from paligemma_jax.files import expanded, write_json
from paligemma_jax.runs import model as models
from paligemma_jax.runs import settings
from paligemma_jax.runs.folder import Folder, refuse_inputs
from paligemma_jax.runs.notes import note
from paligemma_jax.training.data import open_data

_RESULT = "result.json"
_PAPER = "PaliGemma 3B, arXiv 2407.07726"


def run(config: ConfigDict) -> int:
    """Answer, score and report; a run that was stopped goes on in its output_dir."""
    output_format = settings.one_of(config, "format", ("text", "json"))
    task = _task(config)
    for key in ("batch_size", "resamples"):
        if config[key] < 1:
            raise ConfigError(f"{key}={config[key]} is not possible: give an integer of at least 1")
    if config.limit < 0:
        raise ConfigError(f"limit={config.limit} is not possible: give the most examples, or 0 for all")
    if not config.data:
        raise ConfigError("data is empty: name the data set's folder with --config.data=DIR (docs/evaluation.md)")
    models.check_weights(config)
    scale = settings.loc_scale(config)
    if expanded(config.data).is_file():  # of jsonl, whose name then says the split
        task = dataclasses.replace(task, split=expanded(config.data).stem)
    examples = spread(_read(task, expanded(config.data)), config.limit)
    check(task, examples)
    options = pj.GenerateOptions(task.max_new_tokens, pj.Sampling(num_beams=task.num_beams))
    with contextlib.ExitStack() as stack:
        folder = _folder(config, task, examples, stack)
        model = None
        if folder.done < len(examples):
            model = models.load(config, batch_size=config.batch_size)
            if needs_masks(task):
                model.mask_decoder()  # its absence is known before the work
        folder.begin()
        if model is not None:
            _answer(model, Evaluation(task, options, config.batch_size, scale), examples, folder)
        records = list(folder.records())
        result = summarize(task, records, config.resamples, config.seed)
        result = {"task": task.name, "split": task.split, "checkpoint": config.checkpoint, **result}
        result["paper"] = _paper(task, records[0]["resolution"])
        result = _finite(result)
        if config.output_dir:
            folder.own([path := folder.path / _RESULT])
            write_json(path, result)
            note(f"wrote {path}")
    print(json.dumps(result) if output_format == "json" else _table(result))
    return 0


def _read(task: Task, path: Path) -> list[Example]:
    """The examples of a split; those of `jsonl` also from the data sets that training takes (docs/data.md)."""
    is_jsonl = path.suffix == ".jsonl" if path.is_file() else (path / f"{task.split}.jsonl").exists()
    if task.name != "jsonl" or is_jsonl or not path.exists():
        return read(task, path)
    found = list(open_data(path, split=task.split))
    if packed := next(
        (example for example in found if not all(isinstance(name, str) for name in example.images)), None
    ):
        raise DataError(f"{packed.where} holds its picture itself: write the pictures to files, and JSON lines beside")
    return [Example(example.where, example.images, {"prefix": example.prefix}, example.suffix) for example in found]


def _task(config: ConfigDict) -> Task:
    """The task with what the config changes about it."""
    task = TASKS[settings.one_of(config, "task", TASKS)]
    names = tuple(name.strip() for name in config.metric.split(",") if name.strip())
    if (strange := next((name for name in names if name not in METRICS), None)) is not None:
        raise ConfigError(f"metric={strange!r} is not possible{settings.did_you_mean(strange, METRICS)}")
    changes = {
        "metrics": names,
        "split": config.split,
        "prompt": config.prompt,
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
    }
    return dataclasses.replace(task, **{name: value for name, value in changes.items() if value})


def _folder(config: ConfigDict, task: Task, examples: list[Example], stack: contextlib.ExitStack) -> Folder:
    """Where the records go: output_dir, or for a run without one a folder that ends with it."""
    asked = [f"{example.id} {prompt_of(task, example)} {example.reference}" for example in examples]
    made = {
        "version": pj.__version__,
        "weights": fingerprint.of_weights(config.checkpoint, config.adapter, config.mask_vae),
        "examples": fingerprint.of_inputs(asked),
        "images": fingerprint.of_inputs([name for example in examples for name in example.images]),
        **{name: getattr(task, name) for name in ("name", "split", "max_new_tokens", "num_beams")},
        "metrics": list(task.metrics),
        **{key: config[key] for key in ("dtype", "quantization", "resample", "loc_scale")},
    }
    if config.output_dir:
        path = expanded(config.output_dir)
        refuse_inputs(path, dict.fromkeys(name for example in examples for name in example.images))
    else:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if (path / _RESULT).exists() and not (path / "records.jsonl").exists():
        raise ConfigError(f"{path} has {_RESULT}, which is of no run that is known here: name another output_dir")
    folder = Folder(path, made, len(examples), resume=not config.overwrite, overwrite=config.overwrite)
    stack.callback(folder.close)
    return folder


def _answer(model: pj.PaliGemma, evaluation: Evaluation, examples: list[Example], folder: Folder) -> None:
    """Answer what is not answered yet, and keep each record as it comes."""
    resolution = {"resolution": model.config.vision.image_size}
    with tqdm(total=len(examples), initial=folder.done, unit="example", disable=None) as bar:
        for records in evaluation.records(model, examples[folder.done :]):
            for record in records:
                folder.add(record | resolution)
            folder.commit(folder.done + len(records), folder.mark(), 0)
            bar.update(len(records))


def _paper(task: Task, resolution: int) -> dict[str, Any] | None:
    """What the paper reports at this resolution, in the unit of our numbers; None where it has nothing."""
    value = task.reference(resolution, task.split)
    if value is None or task.metrics[0] != TASKS[task.name].metrics[0]:
        return None
    return {"value": value / 100, "resolution": resolution, "split": task.paper_split, "model": _PAPER}


def _finite(value: Any) -> Any:
    """The same with None for what could not be measured: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _table(result: dict[str, Any]) -> str:
    """The result in percent, the main number first."""
    main = result["main"]
    rows = [(main["name"], _percent(main["value"]), "")]
    if main["interval"]:
        low, high = map(_percent, main["interval"])
        rows[0] = (*rows[0][:2], f"95% interval {low} to {high}")
    rows += [(f"  {name}", _percent(value), "") for name, value in result["groups"].items()]
    several = len(result["metrics"]) > 1
    for metric, values in result["metrics"].items():
        names = [name for name in values if name != main["name"]]
        rows += [(f"{metric} {name}" if several else name, _percent(values[name]), "") for name in names]
    if paper := result["paper"]:
        about = f"{paper['model']}, {paper['resolution']} px, split {paper['split']}"
        rows.append(("the paper's", _percent(paper["value"]), about))
    width = max(len(name) for name, *_ in rows)
    head = f"{result['task']}, split {result['split']}, {result['examples']:,} examples, in percent"
    return "\n".join([head, *(f"{name:<{width}}  {value:>7}  {more}".rstrip() for name, value, more in rows)])
