"""A model's answers to the examples of a task, scored one by one, and the result over all."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from paligemma_jax.api import PaliGemma
from paligemma_jax.errors import DataError
from paligemma_jax.evaluation.bootstrap import interval
from paligemma_jax.evaluation.examples import Example, Objects, check_pictures
from paligemma_jax.evaluation.metrics import METRICS, Metric, Scores
from paligemma_jax.evaluation.metrics.boxes import TEXT_SIZE
from paligemma_jax.evaluation.tasks import Task
from paligemma_jax.models import mask_vae
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import parse
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.output import Output
from paligemma_jax.tasks.prompts import read_prompt
from paligemma_jax.tasks.reading import read
from paligemma_jax.tasks.segmentation import attach_masks

Record = dict[str, Any]
T = TypeVar("T")


def check(task: Task, examples: Sequence[Example]) -> None:
    """What would end the work after hours is found before it.

    Raises:
      DataError: pictures or examples are missing, or references do not fit the metric.
      ConfigError: a metric needs pycocotools, which is not installed.
    """
    if not examples:
        raise DataError(f"{task.name} has no examples here: give another split or other data")
    check_pictures(examples)
    for name in task.metrics:
        if not METRICS[name].objects and any(isinstance(example.reference, Objects) for example in examples):
            raise DataError(f"{name} compares texts, and the examples of {task.name} are boxes: take another metric")
        if METRICS[name].objects and not any(_has_objects(example.reference) for example in examples):
            raise DataError(f"{name} is of objects, and no reference of {task.name} has any: take another metric")
    outlined = any(isinstance(example.reference, Objects) and example.reference.segmentations for example in examples)
    if outlined or any(METRICS[name].needs_pycocotools for name in task.metrics):
        coco.require()


def _has_objects(reference: str | tuple[str, ...] | Objects) -> bool:
    if isinstance(reference, Objects):
        return True
    return any(read(text) for text in ((reference,) if isinstance(reference, str) else reference))


def spread(examples: Sequence[T], limit: int) -> list[T]:
    """So many of the examples, evenly spread, so that all parts of a data set are among them; 0 for all."""
    count = len(examples)
    return [examples[i * count // limit] for i in range(limit)] if 0 < limit < count else list(examples)


def needs_masks(task: Task) -> bool:
    """Whether answers are decoded by the mask VQ-VAE."""
    return any(METRICS[name].masks for name in task.metrics)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How answers are made.

    options: those of each answer.
    batch_size: prompts that are answered together.
    loc_scale: location that means the far edge of a picture.
    """

    task: Task
    options: GenerateOptions
    batch_size: int = 16
    loc_scale: int = 1023

    def records(self, model: PaliGemma, examples: Sequence[Example]) -> Iterator[list[Record]]:
        """What was asked, said and scored, for each batch in turn.

        A record has id, images, prompt, prediction, references, group, and scores by the metrics' names.
        """
        for start in range(0, len(examples), self.batch_size):
            batch = examples[start : start + self.batch_size]
            prompts = [prompt_of(self.task, example) for example in batch]
            images = [list(example.images) for example in batch]
            outputs = model.generate(images, prompts, batch_size=self.batch_size, options=self.options)
            yield [self._record(model, *each) for each in zip(batch, prompts, outputs, strict=True)]

    def _record(self, model: PaliGemma, example: Example, prompt: str, output: Output) -> Record:
        clean, reference = self.task.clean, example.reference
        texts = _texts(reference)
        right = reference if isinstance(reference, Objects) else [clean(text) for text in texts]
        scores: dict[str, Any] = {}
        for name in self.task.metrics:
            metric = METRICS[name]
            if metric.objects:
                found, true = self._objects(model, metric, right, output, read_prompt(prompt).labels)
                scores[name] = metric.measure(found, true)
            else:
                scores[name] = metric.measure(clean(output.text), right)
        images = list(example.images)
        asked = {"id": example.id, "images": images, "prompt": prompt, "prediction": output.text}
        return asked | {"references": texts, "group": example.group, "scores": scores}

    def _objects(
        self, model: PaliGemma, metric: Metric, right: Objects | list[str], output: Output, labels: tuple[str, ...]
    ) -> tuple[Detections, Detections]:
        """What was found and what is there, in pixels; with masks if the metric is about them."""
        masks = metric.masks
        if isinstance(right, Objects):
            true = right.detections()
        else:
            found = parse(right[0], TEXT_SIZE, self.loc_scale, labels)[0]
            true = Detections(attach_masks(found, TEXT_SIZE, _decoder(model)) if masks else found, TEXT_SIZE)
        if metric.read is not None:
            return metric.read(output.text, true.size, _decoder(model)), true
        found, _ = model.objects(output, true.size, self.loc_scale, masks, labels)
        whole = [item for item in found if item.mask is not None] if masks else found
        return Detections(whole, true.size), true


def _decoder(model: PaliGemma) -> Callable[[np.ndarray], np.ndarray]:
    """Mask codes i32 [N, 16] to masks f32 [N, 64, 64]."""
    return lambda codes: np.asarray(mask_vae.decode(model.mask_decoder(), codes))


def _texts(reference: str | tuple[str, ...] | Objects) -> list[str]:
    """A reference as a record shows it."""
    if isinstance(reference, Objects):
        return [f"{label} {list(box)}".strip() for label, box in zip(reference.labels, reference.boxes, strict=True)]
    return [reference] if isinstance(reference, str) else list(reference)


def prompt_of(task: Task, example: Example) -> str:
    """The prompt about an example; DataError when it needs what the data set does not have."""
    try:
        return task.prompt.format(**example.fields)
    except (KeyError, IndexError, ValueError):
        known = ", ".join(f"{{{name}}}" for name in example.fields) or "none"
        raise DataError(f"prompt {task.prompt!r} is not possible for {task.name}: its fields are {known}") from None


def summarize(task: Task, records: Sequence[Record], resamples: int, seed: int) -> dict[str, Any]:
    """The result: examples, main (name, value, interval), metrics by name, groups by name. Shares are 0..1."""
    metrics = [METRICS[name] for name in task.metrics]
    found = {metric.name: _scores(metric, records) for metric in metrics}
    main = found[metrics[0].name]
    groups = _groups(metrics[0], records)
    if task.mean_of_groups and len(groups) > 1:
        main = _mean_of_groups(main, groups, [record["group"] for record in records])
    return {
        "examples": len(records),
        "main": {"name": next(iter(main.values)), "value": main.main, "interval": interval(main, resamples, seed=seed)},
        "metrics": {metric: scores.values for metric, scores in found.items()},
        "groups": groups,
    }


def _scores(metric: Metric, records: Sequence[Record]) -> Scores:
    return metric.summarize([record["scores"][metric.name] for record in records])


def _groups(metric: Metric, records: Sequence[Record]) -> dict[str, float]:
    """The main number of each group; {} where there are none."""
    names = sorted({record["group"] for record in records if record["group"]})
    return {name: _scores(metric, [r for r in records if r["group"] == name]).main for name in names}


def _mean_of_groups(scores: Scores, groups: dict[str, float], group_of: Sequence[str]) -> Scores:
    """The mean over groups, as a mean over examples that are weighted by one over the size of their group."""
    counts = {name: group_of.count(name) for name in groups}
    weights = np.array([1 / counts[name] for name in group_of])
    return Scores({"mean_of_groups": float(np.mean(list(groups.values())))}, scores.per_example, weights)
