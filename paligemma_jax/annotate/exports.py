"""Files for other tools, made of the rows of a whole run: COCO, YOLO, FiftyOne and Label Studio.

Rows are read again for each file, and none is kept: memory grows with the names of its pictures and classes alone.
"""

import contextlib
import html
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from paligemma_jax.annotate import rows as records
from paligemma_jax.annotate.rows import Row
from paligemma_jax.files import Stems, replacing, write_text
from paligemma_jax.tasks import coco, yolo
from paligemma_jax.tasks.classes import UNNAMED
from paligemma_jax.tasks.detection import Box, Detection
from paligemma_jax.tasks.overlap import clip_box
from paligemma_jax.tasks.prompts import Prompt

Rows = Callable[[], Iterator[Row]]
EXPORTS = ("coco", "yolo", "fiftyone", "labelstudio")


def export(
    kinds: Iterable[str], directory: Path, rows: Rows, prompts: Iterable[Prompt], pictures: str = ""
) -> list[Path]:
    """Write the files of each kind, of pictures that were answered; returns what was written.

    Args:
      kinds: of `EXPORTS`.
      rows: gives all rows from the first; those of a picture come one after the other.
      prompts: of the run: classes are numbered as they name them, then as they turn up.
      pictures: folder that relative names of pictures start from.

    Raises:
      ConfigError: there are masks, and pycocotools is not installed.
    """
    if not (kinds := list(kinds)):
        return []
    classes = _classes(rows, prompts)
    return [path for kind in kinds for path in _WRITERS[kind](directory, rows, classes, pictures)]


def _classes(rows: Rows, prompts: Iterable[Prompt]) -> list[str]:
    names = dict.fromkeys(label for prompt in prompts for label in prompt.labels)
    for row in rows():
        names |= dict.fromkeys(box["label"] or UNNAMED for box in row["boxes"])
    return list(names)


def _pictures(rows: Rows) -> Iterator[tuple[str, tuple[int, int], list[Row]]]:
    """Name, size and good rows of each picture that has some."""
    good = (row for row in rows() if row["status"] == records.OK)
    for _, group in groupby(good, key=lambda row: (row["image"], row["width"], row["height"])):
        found = list(group)
        yield found[0]["image"], (found[0]["width"], found[0]["height"]), found


def _objects(found: Iterable[Row]) -> Iterator[tuple[Detection, Any]]:
    """The objects of a picture, each with its mask in COCO's form, or None."""
    for row in found:
        for box, mask in zip(row["boxes"], row["masks"] or [None] * len(row["boxes"]), strict=True):
            corners = tuple(box[name] for name in ("x0", "y0", "x1", "y1"))
            yield Detection(box["label"] or UNNAMED, corners, box["score"]), mask


def _coco(directory: Path, rows: Rows, classes: list[str], pictures: str) -> list[Path]:
    results, dataset = directory / "coco_results.json", directory / "coco_dataset.json"

    def annotations() -> Iterator[coco.Record]:
        for number, (_, size, found) in enumerate(_pictures(rows), 1):
            for item, mask in _objects(found):
                [fields] = coco.annotate([item], number, size, classes)
                if mask:
                    fields |= {"segmentation": mask, "area": int(coco.require().area(mask))}
                yield fields

    def solid() -> Iterator[coco.Record]:
        number = 0
        for fields in annotations():
            for record in coco.to_dataset([], [fields], [])["annotations"]:
                number += 1
                yield record | {"id": number}

    with _json(results) as file:
        _array(file, (record for fields in annotations() for record in coco.to_results([fields])))
    with _json(dataset) as file:
        file.write('{"images": ')
        _array(file, (coco.image(i, name, size) for i, (name, size, _) in enumerate(_pictures(rows), 1)))
        file.write(', "annotations": ')
        _array(file, solid())
        file.write(f', "categories": {json.dumps(coco.to_dataset([], [], classes)["categories"])}}}')
    return [results, dataset]


def _yolo(directory: Path, rows: Rows, classes: list[str], pictures: str) -> list[Path]:
    labels, stems = directory / "labels", Stems()
    labels.mkdir(parents=True, exist_ok=True)
    for name, size, found in _pictures(rows):
        text = yolo.to_yolo([item for item, _ in _objects(found)], size, classes)
        write_text(labels / f"{stems.new(Path(name).stem)}.txt", text)
    write_text(directory / "classes.txt", yolo.class_file(classes))
    return [directory / "classes.txt", labels]


def _fiftyone(directory: Path, rows: Rows, classes: list[str], pictures: str) -> list[Path]:
    """A FiftyOneImageDetectionDataset: boxes as shares of the sides, and where the pictures are."""
    folder = directory / "fiftyone"
    folder.mkdir(parents=True, exist_ok=True)
    labels, data = folder / "labels.json", folder / "data.json"

    def named() -> Iterator[tuple[str, tuple[str, tuple[int, int], list[Row]]]]:
        stems = Stems()
        return ((stems.new(Path(picture[0]).stem), picture) for picture in _pictures(rows))

    with _json(labels) as file:
        file.write(f'{{"classes": {json.dumps(classes)}, "labels": ')
        _object(file, ((stem, _relative(found, size, classes)) for stem, (_, size, found) in named()))
        file.write("}")
    with _json(data) as file:
        _object(file, ((stem, _place(name, pictures)) for stem, (name, _, _) in named()))
    return [labels, data]


def _place(name: str, pictures: str) -> str:
    return name if "://" in name else os.path.abspath(os.path.join(pictures, os.path.expanduser(name)))


def fiftyone_box(box: Box, size: tuple[int, int]) -> list[float]:
    """Left edge, top edge, width and height of a box in the picture, as shares of its sides."""
    x0, y0, x1, y1 = clip_box(box, size)
    return [x0 / size[0], y0 / size[1], (x1 - x0) / size[0], (y1 - y0) / size[1]]


def _relative(found: Iterable[Row], size: tuple[int, int], classes: list[str]) -> list[dict[str, Any]]:
    objects = []
    for item, _ in _objects(found):
        shares = fiftyone_box(item.box, size)
        record = {"label": classes.index(item.label), "bounding_box": [round(share, 6) for share in shares]}
        objects.append(record if item.score is None else record | {"confidence": item.score})
    return objects


def _labelstudio(directory: Path, rows: Rows, classes: list[str], pictures: str) -> list[Path]:
    """Tasks with predictions, to import, and a labelling config that they fit: boxes, and texts of other answers."""
    tasks, config = directory / "labelstudio_tasks.json", directory / "labelstudio_config.xml"
    with _json(tasks) as file:
        _array(file, (_task(name, size, found) for name, size, found in _pictures(rows)))
    labels = "".join(f'    <Label value="{html.escape(name)}"/>\n' for name in classes)
    write_text(
        config,
        '<View>\n  <Image name="image" value="$image"/>\n  <RectangleLabels name="label" toName="image">\n'
        f'{labels}  </RectangleLabels>\n  <TextArea name="text" toName="image"/>\n</View>\n',
    )
    return [tasks, config]


def _task(name: str, size: tuple[int, int], found: list[Row]) -> dict[str, Any]:
    width, height = size
    to = {"to_name": "image", "original_width": width, "original_height": height}
    result = []
    for item, _ in _objects(found):
        x0, y0, x1, y1 = clip_box(item.box, size)
        box = {"x": x0 / width, "y": y0 / height, "width": (x1 - x0) / width, "height": (y1 - y0) / height}
        value = {side: round(100 * share, 4) for side, share in box.items()}  # percent
        value |= {"rotation": 0, "rectanglelabels": [item.label]}
        scored = {} if item.score is None else {"score": item.score}
        result.append({"from_name": "label", "type": "rectanglelabels", "value": value} | to | scored)
    texts = [row["text"] for row in found if not row["boxes"] and row["text"]]
    if texts:
        result.append({"from_name": "text", "type": "textarea", "value": {"text": texts}} | to)
    prediction = {"model_version": found[0]["model"], "result": result}
    scores = [entry["score"] for entry in result if "score" in entry]
    return {"data": {"image": name}, "predictions": [prediction | ({"score": min(scores)} if scores else {})]}


_WRITERS = {"coco": _coco, "yolo": _yolo, "fiftyone": _fiftyone, "labelstudio": _labelstudio}


@contextlib.contextmanager
def _json(path: Path) -> Iterator[TextIO]:
    """A file that is written piece by piece, and is there whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file
        file.write("\n")


def _array(file: TextIO, values: Iterable[Any]) -> None:
    file.write("[")
    for i, value in enumerate(values):
        file.write(f"{',' if i else ''}\n{json.dumps(value, ensure_ascii=False)}")
    file.write("]")


def _object(file: TextIO, pairs: Iterable[tuple[str, Any]]) -> None:
    file.write("{")
    for i, (key, value) in enumerate(pairs):
        entry = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        file.write(f"{',' if i else ''}\n{entry}")
    file.write("}")
