"""Files of all objects of a run, for other tools: COCO's and YOLO's."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paligemma_jax.files import Stems, write_text
from paligemma_jax.runs.notes import note
from paligemma_jax.runs.sources import Source
from paligemma_jax.tasks import coco, yolo
from paligemma_jax.tasks.classes import UNNAMED
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.prompts import read_prompt


class Exports:
    """Collects the objects of a run; `close` writes what is about all pictures.

    Classes are numbered as they are given, then as they turn up. Several prompts about a picture add up.

    Args:
      kinds: of coco and yolo.
      directory: where the files go.
      classes: names that get the first numbers.
    """

    def __init__(self, kinds: Iterable[str], directory: Path, classes: Iterable[str]):
        self._kinds = list(kinds)
        self._directory = directory
        self._classes = list(dict.fromkeys(classes))
        self._images: list[coco.Record] = []
        self._annotations: list[coco.Record] = []
        self._current: tuple[str, float] | None = None  # the picture whose objects come
        self._labels = ""  # its YOLO text so far
        self._label_file = directory
        self._stems = Stems()
        if "yolo" in self._kinds:
            (directory / "labels").mkdir(parents=True, exist_ok=True)  # a bad place is known before the work

    def add(self, source: Source, objects: list[Detection]) -> None:
        """Objects of a picture; those of the same picture come one after the other."""
        objects = [dataclasses.replace(item, label=item.label or UNNAMED) for item in objects]
        new = dict.fromkeys(item.label for item in objects)
        self._classes += [label for label in new if label not in self._classes]
        if self._current != (source.name, source.time):
            self._current = source.name, source.time
            self._images.append(coco.image(len(self._images) + 1, source.name, source.image.size))
            self._labels = ""
            self._label_file = self._new_label_file(source)
        if "coco" in self._kinds:
            self._annotations += coco.annotate(objects, len(self._images), source.image.size, self._classes)
        if "yolo" in self._kinds:
            self._labels += yolo.to_yolo(objects, source.image.size, self._classes)
            write_text(self._label_file, self._labels)

    def close(self) -> None:
        """Write the files about all pictures, and say which."""
        pictures = f"{len(self._images)} picture{'s' * (len(self._images) != 1)}"
        if "coco" in self._kinds:
            results, dataset = (self._directory / f"coco_{form}.json" for form in ("results", "dataset"))
            _write_json(results, coco.to_results(self._annotations))
            _write_json(dataset, coco.to_dataset(self._images, self._annotations, self._classes))
            note(f"wrote {results} and {dataset}, of {pictures}")
        if "yolo" in self._kinds:
            file = self._directory / "classes.txt"
            write_text(file, yolo.class_file(self._classes))
            note(f"wrote {file} and {self._directory / 'labels'}, of {pictures}")

    def _new_label_file(self, source: Source) -> Path:
        """Named as the picture, where trainers look for it, with a number where another picture has that name."""
        stem = self._stems.new(source.stem)
        if stem != source.stem and "yolo" in self._kinds:
            note(f"note: another picture is called {source.stem} too: the labels of {source.name} are in {stem}.txt")
        return self._directory / "labels" / f"{stem}.txt"


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


def classes_of(prompts: Iterable[str]) -> list[str]:
    """The classes that prompts name."""
    return [name for prompt in prompts for name in read_prompt(prompt).labels]


def check(kinds: Iterable[str], prompts: Iterable[str]) -> None:
    """Raise a ConfigError, before the model is loaded, when masks are asked for that could not be written."""
    if "coco" in kinds and any((task := read_prompt(prompt).task) and task.num_codes for prompt in prompts):
        coco.require()
