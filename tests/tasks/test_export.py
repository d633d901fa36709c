import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.tasks import coco, yolo
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.export import save_masks, to_json, to_supervision


@pytest.fixture
def objects():
    masks = np.random.default_rng(0).random((2, 12, 20)) > 0.5
    return [
        Detection("cat", (1, 2.3456, 3, 4), 0.123456, mask=masks[0]),
        Detection("dog", (np.float32(0.1), 0, 5, 6)),
        Detection("猫", (0, 0, 20, 12), mask=masks[1]),
    ]


def test_records(objects, tmp_path):
    files = save_masks(objects, tmp_path / "out", "photo")
    record = json.loads(json.dumps(to_json(objects, files)))
    assert record["boxes"] == [
        {"label": "cat", "box": [1, 2.35, 3, 4], "score": 0.1235},
        {"label": "dog", "box": [0.1, 0, 5, 6], "score": None},
        {"label": "猫", "box": [0, 0, 20, 12], "score": None},
    ]
    assert record["masks"] == [record["boxes"][i] | {"file": str(file)} for i, file in zip((0, 2), files, strict=True)]
    assert to_json([]) == {"boxes": [], "masks": []}
    assert [mask["file"] for mask in to_json(objects)["masks"]] == [None, None]


def test_mask_files_hold_the_masks(objects, tmp_path):
    files = save_masks(objects, tmp_path / "out", "photo")
    assert [file.name for file in files] == ["photo_mask_0.png", "photo_mask_1.png"]
    assert sorted((tmp_path / "out").iterdir()) == files
    for file, item in zip(files, objects[::2], strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), item.mask * np.uint8(255))


@dataclasses.dataclass
class _Detections:
    """The fields of supervision.Detections, in their order; what is no field of it is an error here too."""

    xyxy: np.ndarray
    mask: np.ndarray | None = None
    confidence: np.ndarray | None = None
    class_id: np.ndarray | None = None
    tracker_id: np.ndarray | None = None
    data: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def test_supervision_takes_the_objects(objects, monkeypatch):
    """The package itself brings a hundred megabytes along: a class of its form stands in for it."""
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=_Detections))
    found = to_supervision(objects, ["dog", "cat", "猫"])
    np.testing.assert_allclose(found.xyxy, [item.box for item in objects], rtol=1e-6)
    assert found.class_id.tolist() == [1, 0, 2] and found.data["class_name"].tolist() == ["cat", "dog", "猫"]
    np.testing.assert_allclose(found.confidence, [0.123456, 0, 0])
    np.testing.assert_array_equal(found.mask, [objects[0].mask, np.zeros((12, 20)), objects[2].mask])
    assert (found.xyxy.dtype, found.mask.dtype, found.confidence.dtype) == (np.float32, bool, np.float32)
    boxes = to_supervision(objects[1:2], ["dog"])
    assert boxes.mask is None and boxes.confidence is None and boxes.tracker_id is None
    assert to_supervision([], ["dog"]).xyxy.shape == (0, 4)
    with pytest.raises(DataError, match="label 'cat' is not among"):
        to_supervision(objects, ["dog"])


def test_objects_without_a_label_are_exported_with_a_class(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=_Detections))
    items = [Detection("", (0, 0, 10, 6), 0.5), Detection("cat", (0, 0, 20, 12))]
    assert [box["label"] for box in to_json(items)["boxes"]] == ["", "cat"]
    classes = ["cat", "object"]
    found = to_supervision(items, classes)
    assert found.class_id.tolist() == [1, 0] and found.data["class_name"].tolist() == ["object", "cat"]
    assert [line["category_id"] for line in coco.annotate(items, 1, (20, 12), classes)] == [2, 1]
    assert [line[0] for line in yolo.to_yolo(items, (20, 12), classes).splitlines()] == ["1", "0"]
    assert [line[0] for line in yolo.to_yolo(items, (20, 12), ["cat"]).splitlines()] == ["0", "0"]  # the only class
    for export in (
        lambda names: to_supervision(items, names),
        lambda names: coco.annotate(items, 1, (20, 12), names),
        lambda names: yolo.to_yolo(items, (20, 12), names),
    ):
        with pytest.raises(DataError, match="an object has no label"):
            export(["cat", "dog"])


def test_supervision_may_be_missing(objects, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match="pip install supervision"):
        to_supervision(objects, ["dog"])
