"""Files for other tools, made of rows, beside those that `generate` writes or by the tools' own definition."""

import json
import weakref
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from paligemma_jax.annotate import rows
from paligemma_jax.annotate.exports import EXPORTS, export
from paligemma_jax.tasks import coco, yolo
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.prompts import read_prompt
from tests.annotate.conftest import output

PROMPTS = tuple(map(read_prompt, ("segment circle ; star", "caption en")))
SIZE = (80, 40)


def objects() -> list[Detection]:
    mask = np.zeros(SIZE[::-1], bool)
    mask[10:20, 8:16] = True
    return [Detection("star", (8, 10, 16.5, 20), 0.5, mask=mask), Detection("", (70, 30, 90, 50), None)]


@pytest.fixture
def found() -> list[rows.Row]:
    """Two pictures with objects and a caption, a failed one between them, and one in which nothing was found."""

    def about(name: str, text: str, items: list[Detection], size=SIZE) -> list[rows.Row]:
        detected = rows.answered("k", name, size, PROMPTS[0], output("boxes" if items else ""), items)
        caption = rows.answered("k", name, size, PROMPTS[1], output(text), [])
        return [row | {"model": "m"} for row in (detected, caption)]

    failed = [rows.failed("k", "broken.png", None, prompt, "broken") for prompt in PROMPTS]
    other = [Detection('a "moon" & <sun>', (0, 0, 40, 20), 0.25)]
    return [*about("d/a.png", "two", objects()), *failed, *about("e/A.jpg", "one", other), *about("c.png", "", [])]


def test_coco_files_are_those_of_the_command_line(found, tmp_path):
    written = export(["coco"], tmp_path, lambda: iter(found), PROMPTS)
    assert [path.name for path in written] == ["coco_results.json", "coco_dataset.json"]
    classes = ["circle", "star", "object", 'a "moon" & <sun>']
    named = [objects()[0], Detection("object", objects()[1].box)]
    moon = Detection(classes[3], (0, 0, 40, 20), 0.25)
    annotations = [*coco.annotate(named, 1, SIZE, classes), *coco.annotate([moon], 2, SIZE, classes)]
    images = [coco.image(i, name, SIZE) for i, name in enumerate(("d/a.png", "e/A.jpg", "c.png"), 1)]
    assert json.loads(written[0].read_text()) == coco.to_results(annotations)
    assert json.loads(written[1].read_text()) == coco.to_dataset(images, annotations, classes)


def test_coco_reads_them(found, tmp_path):
    from pycocotools.coco import COCO

    export(["coco"], tmp_path, lambda: iter(found), PROMPTS)
    dataset = COCO(tmp_path / "coco_dataset.json")
    results = dataset.loadRes(str(tmp_path / "coco_results.json"))
    assert (len(dataset.imgs), len(dataset.anns), len(results.anns)) == (3, 3, 3)
    assert coco.require().area(dataset.annToRLE(dataset.anns[1])) == 80


def test_yolo_files(found, tmp_path):
    export(["yolo"], tmp_path, lambda: iter(found), PROMPTS)
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["A_2.txt", "a.txt", "c.txt"]
    classes = (tmp_path / "classes.txt").read_text().splitlines()
    named = [objects()[0], Detection("object", objects()[1].box)]
    assert (tmp_path / "labels" / "a.txt").read_text() == yolo.to_yolo(named, SIZE, classes)
    assert (tmp_path / "labels" / "c.txt").read_text() == ""


def test_fiftyone_files(found, tmp_path):
    export(["fiftyone"], tmp_path, lambda: iter(found), PROMPTS, pictures=str(tmp_path / "pictures"))
    labels = json.loads((tmp_path / "fiftyone" / "labels.json").read_text())
    assert labels["classes"] == ["circle", "star", "object", 'a "moon" & <sun>']
    assert labels["labels"] == {
        "a": [
            {"label": 1, "bounding_box": [0.1, 0.25, 0.10625, 0.25], "confidence": 0.5},
            {"label": 2, "bounding_box": [0.875, 0.75, 0.125, 0.25]},  # cut at the edges
        ],
        "A_2": [{"label": 3, "bounding_box": [0, 0, 0.5, 0.5], "confidence": 0.25}],
        "c": [],
    }
    places = json.loads((tmp_path / "fiftyone" / "data.json").read_text())
    assert places["A_2"] == str(tmp_path / "pictures" / "e" / "A.jpg") and list(places) == list(labels["labels"])


def test_label_studio_files(found, tmp_path):
    export(["labelstudio"], tmp_path, lambda: iter(found), PROMPTS)
    tasks = json.loads((tmp_path / "labelstudio_tasks.json").read_text())
    assert [task["data"] for task in tasks] == [{"image": name} for name in ("d/a.png", "e/A.jpg", "c.png")]
    [prediction] = tasks[0]["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("m", 0.5)
    box, _, text = prediction["result"]
    assert box == {
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 80,
        "original_height": 40,
        "value": {"x": 10, "y": 25, "width": 10.625, "height": 25, "rotation": 0, "rectanglelabels": ["star"]},
        "score": 0.5,
    }
    assert (text["type"], text["value"]) == ("textarea", {"text": ["two"]})
    assert tasks[2]["predictions"][0]["result"] == []
    config = ET.parse(tmp_path / "labelstudio_config.xml").getroot()
    names = [label.get("value") for label in config.iter("Label")]
    assert names == ["circle", "star", "object", 'a "moon" & <sun>']
    controls = {node.get("name"): node.get("toName") for node in config}
    assert all(controls[entry["from_name"]] == entry["to_name"] for entry in prediction["result"])


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_run_without_any_good_row_is_exported_too(tmp_path, kind):
    rows_of = [rows.failed("k", "a.png", None, PROMPTS[0], "broken")]
    assert all(path.exists() for path in export([kind], tmp_path, lambda: iter(rows_of), PROMPTS))


def test_rows_are_read_again_for_each_file_and_not_kept(tmp_path):
    """The last row is gone when the next is asked for."""
    passes, last = [], []

    class Kept(dict):
        """A row that can be watched."""

    def generate():
        passes.append(0)
        for i in range(50):
            row = Kept(rows.answered("k", f"{i}.png", SIZE, PROMPTS[1], output(str(i)), []))
            last.append(weakref.ref(row))
            yield row
            del row
            passes[-1] = max(passes[-1], sum(watched() is not None for watched in last))

    export(["coco"], tmp_path, generate, PROMPTS)
    assert len(passes) == 4  # classes, results, images and annotations
    assert max(passes) <= 3
