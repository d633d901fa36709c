"""Metrics of a model on held-out scenes: captions, answers, boxes and masks."""

import collections
import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from paligemma_jax.api import PaliGemma
from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation.metrics.boxes import ImageDetections, auc, match, mean_average_precision
from paligemma_jax.shapes_world.questions import Question, caption, sample_answer, sample_locate
from paligemma_jax.shapes_world.samples import Sample, scene_sample
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.overlap import box_iou, mask_iou

_ANSWERS_PER_SCENE = 3
_MAX_NEW_TOKENS = 128
_BATCH_SCENES = 16


@dataclasses.dataclass
class Tally:
    """What was measured so far.

    values: numbers by what they measure.
    located: what was found, what is there, and the image's size, of each `detect`.
    """

    values: dict[str, list[float]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    located: list[ImageDetections] = dataclasses.field(default_factory=list)

    def mean(self, name: str) -> float:
        """NaN when nothing was measured."""
        return float(np.mean(self.values[name])) if self.values[name] else float("nan")

    def ratio(self, name: str, of: str) -> float:
        """One sum as a share of another."""
        return float(np.sum(self.values[name]) / max(1.0, np.sum(self.values[of])))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about one of the images."""

    sample: Sample
    question: Question


def evaluate(
    model: PaliGemma,
    num_scenes: int = 500,
    seed: int = 20_000_000,
    source: Callable[[int, int], Sample] = scene_sample,
    constrain: bool = False,
) -> dict[str, dict[str, float]]:
    """Ask about the first images of a seed, `source(seed, index)`, which training never saw; progress on stderr.

    Of every image: the caption in English and German, three questions, one `detect` and one `segment`. Captions and
    answers count when they are right to the letter. Things found are matched to true ones of their label, best first,
    at an IoU of at least one half; `mean_iou` is over the matched boxes, `mask_miou` over all true things, a missed one
    counting 0. `absent_empty` is the share of empty answers where nothing asked for is there, `malformed` of those with
    an incomplete object. `score_auc` is the chance that a matched box scores higher than one that is not; COCO's `map`,
    which takes the scores too, needs pycocotools and is NaN without. If there are scenes without a thing, "empty" has
    the shares of their captions that say so, and of their `detect` and `segment` that find no object.

    With `constrain` answers with boxes can be nothing but well-formed; see `engine.constraints.grammar`.

    Returns:
      Per task its numbers, each in 0..1 but for the counts.
    """
    tally = Tally()
    with tqdm(total=num_scenes, desc="evaluating", unit="scene") as bar:
        for start in range(0, num_scenes, _BATCH_SCENES):
            indices = range(start, min(start + _BATCH_SCENES, num_scenes))
            samples = [source(seed, index) for index in indices]
            for ask in (_captions, _answers, _locations):  # answers of like length are generated together
                asked = (ask(sample, seed, index) for sample, index in zip(samples, indices, strict=True))
                _measure(model, list(itertools.chain.from_iterable(asked)), tally, constrain)
            bar.update(len(samples))

    mean, ratio = tally.mean, tally.ratio
    return {
        "caption": {"exact_en": mean("caption en"), "exact_de": mean("caption de")},
        "answer": {
            "accuracy": mean("answer"),
            **{kind: mean(f"answer {kind}") for kind in ("how many", "is there", "what color", "what shape")},
        },
        "detect": {
            "mean_iou": mean("detect iou"),
            "recall": ratio("detect matched", "detect true"),
            "precision": ratio("detect matched", "detect found"),
            "absent_empty": mean("detect absent"),
            "malformed": mean("detect malformed"),
            "score_auc": auc(tally.values["detect right"], tally.values["detect wrong"]),
            **_average_precision(tally.located),
        },
        "segment": {
            "mask_miou": mean("segment mask"),
            "mean_iou": mean("segment iou"),
            "recall": ratio("segment matched", "segment true"),
            "precision": ratio("segment matched", "segment found"),
            "absent_empty": mean("segment absent"),
            "malformed": mean("segment malformed"),
        },
        **_empty(tally),
        "counts": {
            "scenes": num_scenes,
            "answers": len(tally.values["answer"]),
            "objects": int(np.sum(tally.values["detect true"])),
        },
    }


def _empty(tally: Tally) -> dict[str, dict[str, float]]:
    """The numbers of the scenes without a thing, nothing if there are none."""
    names = ("caption en", "caption de", "detect", "segment")
    found = {name.replace(" ", "_"): tally.mean(f"empty {name}") for name in names if tally.values[f"empty {name}"]}
    return {"empty": {**found, "scenes": len(tally.values["empty detect"])}} if found else {}


def _average_precision(located: list[ImageDetections]) -> dict[str, float]:
    try:
        return mean_average_precision(located)
    except ConfigError:
        return {"map": float("nan")}


def _captions(sample: Sample, seed: int, index: int) -> list[Asked]:
    languages = ("en", "de")
    questions = [Question(f"caption {lang}", caption(sample.kinds, lang), f"caption {lang}") for lang in languages]
    return [Asked(sample, question) for question in questions]


def _answers(sample: Sample, seed: int, index: int) -> list[Asked]:
    rng = np.random.default_rng((seed, index, 1))
    return [Asked(sample, sample_answer(sample.kinds, rng)) for _ in range(_ANSWERS_PER_SCENE)]


def _locations(sample: Sample, seed: int, index: int) -> list[Asked]:
    rng = np.random.default_rng((seed, index, 2))
    left = np.array([box[0] for box in sample.boxes])
    return [Asked(sample, sample_locate(task, sample.kinds, left, rng)) for task in ("detect", "segment")]


def _measure(model: PaliGemma, asked: list[Asked], tally: Tally, constrain: bool) -> None:
    images, prompts = [a.sample.image for a in asked], [a.question.prefix for a in asked]
    outputs = model.generate(images, prompts, _MAX_NEW_TOKENS, constrain=constrain)
    for item, output in zip(asked, outputs, strict=True):
        task = item.question.task
        if task in ("detect", "segment"):
            _measure_location(item, *model.objects(output, item.sample.image.size), output.text, tally)
            continue
        right = float(output.text == item.question.suffix)
        tally.values[task].append(right)
        if not item.sample.kinds and task != "answer":
            tally.values[f"empty {task}"].append(right)
        if task == "answer":
            kind = " ".join(item.question.prefix.split()[2:4])
            tally.values[f"answer {kind}"].append(right)


def _measure_location(item: Asked, found: list[Detection], dropped: list[str], text: str, tally: Tally) -> None:
    task, truth, size = item.question.task, item.question.objects, item.sample.image.size
    values = tally.values
    if not truth:
        values[f"{task} absent"].append(float(not text))
    if not item.sample.kinds:
        values[f"empty {task}"].append(float(not found))
    values[f"{task} malformed"].append(float(bool(dropped)))
    boxes = [item.sample.boxes[index] for index, _ in truth]
    overlap = np.zeros((len(found), len(truth)))
    for i, detection in enumerate(found):
        for j, (_, label) in enumerate(truth):
            overlap[i, j] = box_iou(detection.box, boxes[j]) if detection.label == label else 0.0
    pairs = match(overlap)
    values[f"{task} iou"] += [float(overlap[pair]) for pair in pairs]
    values[f"{task} matched"].append(len(pairs))
    values[f"{task} found"].append(len(found))
    values[f"{task} true"].append(len(truth))
    right = {i for i, _ in pairs}
    for i, detection in enumerate(found):
        values[f"{task} right" if i in right else f"{task} wrong"].append(detection.score or 0.0)
    if task == "detect":
        true = [Detection(label, box) for (_, label), box in zip(truth, boxes, strict=True)]
        tally.located.append((found, true, size))
    if task == "segment" and truth:
        matched = {j: found[i].mask for i, j in pairs}
        for j, (index, _) in enumerate(truth):
            mask = matched.get(j)
            values["segment mask"].append(0.0 if mask is None else mask_iou(mask, item.sample.masks[index]))
