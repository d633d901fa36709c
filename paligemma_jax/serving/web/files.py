"""Answers as files to download: JSON, COCO, and the picture with its objects drawn on it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import write_text
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.tasks import coco, export
from paligemma_jax.tasks.classes import UNNAMED
from paligemma_jax.tasks.draw import MASK_OPACITY, draw


@dataclasses.dataclass(frozen=True)
class Files:
    """Of one answer; None for what it does not have.

    notes: why a file is missing that one might expect.
    """

    json: Path
    coco: Path | None = None
    png: Path | None = None
    notes: tuple[str, ...] = ()


def write_files(
    directory: Path,
    question: Question,
    output: pj.Output,
    objects: Sequence[pj.Detection],
    dropped: Sequence[str],
    opacity: float = MASK_OPACITY,
) -> Files:
    """Write the files of an answer into a directory of its own; without objects there is the JSON alone.

    Args:
      objects, dropped: of the answer, in pixels of the question's picture.
      opacity: of the masks on the PNG.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem, prompt = Path(question.name).stem or "picture", question.prompt
    record = export.record(question.name, prompt.text, output, objects, dropped)
    path = directory / f"{stem}.json"
    write_text(path, _json(record))
    if not objects:
        return Files(path)
    picture = directory / f"{stem}_drawn.png"
    draw(question.picture, objects, opacity).save(picture)
    named = [dataclasses.replace(item, label=item.label or UNNAMED) for item in objects]
    classes = list(dict.fromkeys([*prompt.labels, *(item.label for item in named)]))
    size = question.picture.size
    try:
        annotations = coco.annotate(named, 1, size, classes)
    except ConfigError as error:
        return Files(path, None, picture, (str(error),))
    dataset = directory / f"{stem}_coco.json"
    images = [coco.image(1, Path(question.name).name, size)]
    write_text(dataset, _json(coco.to_dataset(images, annotations, classes)))
    return Files(path, dataset, picture)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
