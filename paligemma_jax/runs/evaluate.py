"""config.run=evaluate: how good the shipped model is on its scenes; with a task, how good a model is on a data set."""

import json
import math

from ml_collections import ConfigDict

from paligemma_jax.engine.generate import BATCH_SIZE
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded, write_json
from paligemma_jax.runs import environment, evaluate_task, settings
from paligemma_jax.runs import model as models
from paligemma_jax.runs.notes import note
from paligemma_jax.shapes_world import evaluation
from paligemma_jax.shapes_world.foreign_scenes import foreign_sample, wide_foreign_sample
from paligemma_jax.shapes_world.pointing import pointing
from paligemma_jax.shapes_world.samples import scene_sample, wide_sample

SOURCES = {  # config.data
    "scenes": scene_sample,
    "foreign": foreign_sample,
    "wide": wide_sample,
    "wide_foreign": wide_foreign_sample,
}


def run(config: ConfigDict) -> int:
    """Measure and report."""
    if "task" in config:  # configs/evaluate.py
        return evaluate_task.run(config)
    output_format = settings.one_of(config, "format", ("text", "json"))
    source = SOURCES[settings.one_of(config, "data", SOURCES)]
    measure = settings.one_of(config, "measure", ("answers", "pointing"))
    if config.num_scenes < 1:
        raise ConfigError(f"num_scenes={config.num_scenes} is not possible: give an integer of at least 1")
    output = expanded(config.output) if config.output else None
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)  # a bad place is known before the work
    profile = environment.profiled(config)
    model = models.load(config, batch_size=BATCH_SIZE if measure == "answers" else 1)
    with profile:
        if measure == "answers":
            measured = evaluation.evaluate(model, config.num_scenes, config.scenes_seed, source, config.constrain)
        else:
            measured = {"pointing": pointing(model, config.num_scenes, config.scenes_seed, source)}
    metrics = {task: {name: _finite(value) for name, value in values.items()} for task, values in measured.items()}
    if output_format == "json":
        print(json.dumps(metrics))
    else:
        rows = {f"{task} {name}": _show(value) for task, values in metrics.items() for name, value in values.items()}
        width = max(map(len, rows))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    if output:
        write_json(output, metrics)
        note(f"wrote {output}")
    return 0


def _finite(value: float) -> float | None:
    """None for what could not be measured: JSON has no NaN."""
    return None if math.isnan(value) else value


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
