"""Boxes and masks: COCO detection and the RefCOCO family."""

from pathlib import Path
from typing import Any

from paligemma_jax.errors import DataError
from paligemma_jax.evaluation.examples import Example, Objects, field, first_of, grouped, load_json


def coco_detection(root: Path, split: str) -> list[Example]:
    """`annotations/instances_{split}.json`; all categories are asked for, and crowds are left out."""
    path = first_of(root, [f"annotations/instances_{split}.json", f"instances_{split}.json", f"{split}.json"])
    content = load_json(path)
    folder = first_of(root, [split, f"images/{split}", "images"])
    names = {field(row, "id", path): field(row, "name", path) for row in field(content, "categories", path)}
    single = [row for row in field(content, "annotations", path) if not row.get("iscrowd")]
    objects = grouped(single, "image_id", path)
    fields = {"classes": " ; ".join(names.values())}
    return [
        Example(
            str(field(image, "id", path)),
            (str(folder / field(image, "file_name", path)),),
            fields,
            _objects(image, objects.get(image["id"], []), names, path),
        )
        for image in field(content, "images", path)
    ]


def _objects(image: dict, rows: list[dict], names: dict[Any, str], path: Path, masks: bool = False) -> Objects:
    return Objects(
        (field(image, "width", path), field(image, "height", path)),
        tuple(names[field(row, "category_id", path)] if names else "" for row in rows),
        tuple(tuple(map(float, field(row, "bbox", path))) for row in rows),
        tuple(field(row, "segmentation", path) for row in rows) if masks else (),
    )


def refcoco(root: Path, split: str) -> list[Example]:
    """`instances.json` and `refs.json`, the data set's `refs(unc).p` as JSON: a phrase for each example.

    Raises:
      DataError: there is a pickle only, which could run any program when it is read.
    """
    if not (root / "refs.json").exists() and (pickles := sorted(root.glob("refs*.p"))):
        raise DataError(f"{pickles[0]} is a pickle, which is not read here: docs/evaluation.md makes refs.json of it")
    path, instances = first_of(root, ["refs.json"]), first_of(root, ["instances.json"])
    content = load_json(instances)
    images = {field(image, "id", instances): image for image in field(content, "images", instances)}
    objects = {field(row, "id", instances): row for row in field(content, "annotations", instances)}
    folder = first_of(root, ["train2014", "images/train2014", "images"])
    examples = []
    for ref in load_json(path):
        if field(ref, "split", path) != split:
            continue
        image = field(images, field(ref, "image_id", path), instances)
        row = field(objects, field(ref, "ann_id", path), instances)
        truth = _objects(image, [row], {}, instances, masks=True)
        picture = (str(folder / field(image, "file_name", instances)),)
        for sentence in field(ref, "sentences", path):
            number = str(field(sentence, "sent_id", path))
            examples.append(Example(number, picture, {"phrase": field(sentence, "sent", path)}, truth))
    return examples
