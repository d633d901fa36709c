"""What COCO's own tools make of our files."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reader

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection

CLASSES = ["cat", "dog"]
SIZE = (20, 12)


def mask_of(box):
    mask = np.zeros((SIZE[1], SIZE[0]), bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def find(*items, masks=False):
    return [Detection(label, box, score, mask=mask_of(box) if masks else None) for label, box, score in items]


CAT, DOG = ("cat", (2, 1, 10, 11), 0.9), ("dog", (0, 0, 20, 6), 0.4)


def evaluate(path, found, masks):
    """Average precision that COCOeval gives `found` against the dataset in a file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(found), "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize("masks", [False, True])
def test_cocoeval_reads_both_forms(tmp_path, masks):
    pictures = [("a.png", find(CAT, DOG, masks=masks)), ("b.png", []), ("c.png", find(DOG, masks=masks))]
    images = [coco.image(i, name, SIZE) for i, (name, _) in enumerate(pictures, 1)]
    annotations = [a for i, (_, items) in enumerate(pictures, 1) for a in coco.annotate(items, i, SIZE, CLASSES)]
    for name, value in {
        "dataset": coco.to_dataset(images, annotations, CLASSES),
        "results": coco.to_results(annotations),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    results = json.loads((tmp_path / "results.json").read_text())
    assert evaluate(tmp_path / "dataset.json", str(tmp_path / "results.json"), masks) == pytest.approx(1.0)
    assert evaluate(tmp_path / "dataset.json", results[:1], masks) < 0.6  # the dogs are missed


def test_records():
    found = coco.annotate(find(CAT, ("dog", (-5, 3.456, 30, 12), None)), 7, SIZE, CLASSES)
    assert found == [
        {"image_id": 7, "category_id": 1, "bbox": [2.0, 1.0, 8.0, 10.0], "area": 80.0, "score": 0.9},
        {"image_id": 7, "category_id": 2, "bbox": [0.0, 3.46, 20.0, 8.54], "area": 170.8, "score": 0.0},
    ]
    assert coco.to_results(found) == [{k: v for k, v in fields.items() if k != "area"} for fields in found]
    dataset = coco.to_dataset([coco.image(7, "a.png", SIZE)], found, CLASSES)
    assert dataset["images"] == [{"id": 7, "file_name": "a.png", "width": 20, "height": 12}]
    assert [category["name"] for category in dataset["categories"]] == CLASSES
    for i, (annotation, fields) in enumerate(zip(dataset["annotations"], found, strict=True), 1):
        extra = {"id": i, "iscrowd": 0, "segmentation": []}
        assert annotation == extra | {k: v for k, v in fields.items() if k != "score"}


def test_the_area_of_an_object_is_its_mask():
    [item] = find(CAT, masks=True)
    item.mask[5] = False
    [fields] = coco.annotate([item], 1, SIZE, CLASSES)
    assert fields["area"] == item.mask.sum() == 72
    assert json.loads(json.dumps(fields)) == fields


def test_datasets_leave_out_what_has_no_area():
    found = coco.annotate(find(("cat", (3, 3, 3, 9), 1.0), ("cat", (30, 0, 40, 5), 1.0), CAT), 1, SIZE, CLASSES)
    assert len(coco.to_results(found)) == 3
    [annotation] = coco.to_dataset([coco.image(1, "a.png", SIZE)], found, CLASSES)["annotations"]
    assert annotation["id"] == 1 and annotation["bbox"] == [2.0, 1.0, 8.0, 10.0]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools, about its own arrays
@settings(deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_masks_round_trip(width, height, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    encoded = json.loads(json.dumps(coco.encode_mask(mask)))
    assert encoded["size"] == [height, width]
    np.testing.assert_array_equal(reader.decode(encoded), mask)


def test_an_unknown_label_is_an_error():
    with pytest.raises(DataError, match="label 'cat' is not among the classes"):
        coco.annotate(find(CAT), 1, SIZE, ["dog"])


def test_only_masks_need_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert len(coco.annotate(find(CAT, DOG), 1, SIZE, CLASSES)) == 2
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[export\]"'):
        coco.annotate(find(CAT, masks=True), 1, SIZE, CLASSES)
