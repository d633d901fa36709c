"""COCO's instances JSON, and Roboflow's `_annotations.coco.json`.

Boxes are x, y, width and height in pixels from 0; outlines polygons or run lengths. Crowds, which are no objects of
their own, are left out. Source: https://cocodataset.org/#format-data.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.run_lengths import read_runs
from paligemma_jax.training.data.examples import Examples
from paligemma_jax.training.data.found import Found, ReadSettings, picture_in
from paligemma_jax.training.data.readers import json_file
from paligemma_jax.training.data.regions import Outline, Region, box_around

_TABLES = ("images", "annotations", "categories")


@dataclasses.dataclass(frozen=True, slots=True)
class _Annotation:
    """What is kept of one: its category, box and outline in pixels, and whether it is a crowd."""

    category: int
    box: tuple[float, ...] | None
    segmentation: Any
    is_crowd: bool


def read(found: Found, settings: ReadSettings) -> Examples:
    """A picture without annotations is an example whose answer is empty.

    Raises:
      DataError: a table or a picture is missing, or an annotation is not what it should be.
    """
    path = found.files[0]
    root = settings.image_root or found.root
    try:
        images, by_picture, categories = _tables(path, settings.task == "segment")
        names = _classes(categories, path)
        examples = settings.detection_set(names.values())
        for image_id, name, size in images:
            of_image = by_picture.pop(image_id, [])
            single = [annotation for annotation in of_image if not annotation.is_crowd]
            examples.odd["of crowds"] += len(of_image) - len(single)
            with settings.row():
                where = f"{path} image {image_id}"
                if min(size) < 1:
                    raise DataError(f"{where} is {size[0]} x {size[1]}: give width and height in pixels")
                regions = [_region(annotation, names, size, where) for annotation in single]
                examples.add(picture_in(root, name, where), where, regions, size)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no COCO data set: {type(error).__name__} {error}; export it again") from None
    if by_picture:
        raise DataError(f"{path} has annotations of image {next(iter(by_picture))}, which is not among its images")
    examples.odd += Counter()  # counts of 0 go
    return settings.done(examples, found)


def _tables(path: Path, with_outlines: bool) -> tuple[list[tuple], dict[Any, list[_Annotation]], list[dict[str, Any]]]:
    """Images (id, name and size), annotations by image, and categories."""
    images: list[tuple] = []
    categories: list[dict[str, Any]] = []
    by_picture: dict[Any, list[_Annotation]] = defaultdict(list)
    there = set()
    for table, item in json_file.items(path, _TABLES):
        if item is None:
            there.add(table)
        elif table == "images":
            images.append((item["id"], item["file_name"], (int(item["width"]), int(item["height"]))))
        elif table == "categories":
            categories.append(item)
        else:
            box = tuple(map(float, item["bbox"])) if "bbox" in item else None
            outline = _kept(item.get("segmentation")) if with_outlines or box is None else None
            annotation = _Annotation(item["category_id"], box, outline, bool(item.get("iscrowd")))
            by_picture[item["image_id"]].append(annotation)
    if missing := [table for table in _TABLES if table not in there]:
        raise DataError(f"{path} is no COCO data set: it has no list {missing[0]!r}")
    return images, by_picture, categories


def _kept(segmentation: Any) -> Any:
    """Polygons as arrays, which take a tenth of the memory of lists; run lengths as they are."""
    if isinstance(segmentation, list):
        return [np.array(polygon, np.float32).reshape(-1, 2) for polygon in segmentation]
    return segmentation


def _classes(categories: Sequence[dict[str, Any]], path: Path) -> dict[int, str]:
    """Names by number, in the order of the numbers; Roboflow's name of the whole project is no class."""
    try:
        parents = {category.get("supercategory") for category in categories}
        named = {
            category["id"]: category["name"]
            for category in sorted(categories, key=lambda category: category["id"])
            if not (category.get("supercategory") in ("none", "") and category["name"] in parents)
        }
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{path} has categories without id and name: export the data set again") from None
    return named


def _region(annotation: _Annotation, names: dict[int, str], size: tuple[int, int], where: str) -> Region:
    if annotation.category not in names:
        raise DataError(f"{where} has an object of category {annotation.category}, which is not among the categories")
    outline = _outline(annotation.segmentation, size, where)
    if annotation.box is not None:
        x, y, width, height = annotation.box
        box = (x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1])
    elif isinstance(outline, tuple):
        box = box_around(outline)
    else:
        raise DataError(f"{where} has an object without bbox: give one")
    return Region(names[annotation.category], box, outline)


def _outline(value: Any, size: tuple[int, int], where: str) -> Outline | None:
    """Polygons in pixels, or run lengths as a list or compressed text; None when there are none."""
    if not value:
        return None
    if isinstance(value, dict):
        runs = read_runs(value)
        if (runs.width, runs.height) != size:
            shown = f"{runs.width} x {runs.height}"
            raise DataError(f"{where} has a mask of {shown} and is {size[0]} x {size[1]}: export it again")
        return runs
    return tuple(polygon / np.array(size, np.float32) for polygon in value if len(polygon) > 2) or None
