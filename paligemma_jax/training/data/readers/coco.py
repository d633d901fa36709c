"""COCO's instances JSON, and Roboflow's `_annotations.coco.json`.

Boxes are x, y, width and height in pixels from 0; outlines polygons or run lengths. Crowds, which are no objects of
their own, are left out. Source: https://cocodataset.org/#format-data.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.training.data.examples import Examples
from paligemma_jax.training.data.found import Found, ReadSettings, picture_in
from paligemma_jax.training.data.readers import json_file
from paligemma_jax.training.data.regions import Outline, Region, Runs, box_around, read_counts

_TABLES = ("images", "annotations", "categories")


def read(found: Found, settings: ReadSettings) -> Examples:
    """A picture without annotations is an example whose answer is empty.

    Raises:
      DataError: a table or a picture is missing, or an annotation is not what it should be.
    """
    path = found.files[0]
    value = json_file.load(path)
    if not isinstance(value, dict) or any(not isinstance(value.get(table), list) for table in _TABLES):
        raise DataError(f"{path} is no COCO data set: it needs the lists {', '.join(_TABLES)}")
    names = _classes(value["categories"], path)
    examples = settings.detection_set(names.values())
    root = settings.image_root or found.root
    try:
        by_picture = defaultdict(list)
        for annotation in value.pop("annotations"):
            by_picture[annotation["image_id"]].append(annotation)
        for image in value["images"]:
            of_image = by_picture.pop(image["id"], [])
            single = [annotation for annotation in of_image if not annotation.get("iscrowd")]
            examples.odd["of crowds"] += len(of_image) - len(single)
            with settings.row():
                where = f"{path} image {image['id']}"
                size = int(image["width"]), int(image["height"])
                if min(size) < 1:
                    raise DataError(f"{where} is {size[0]} x {size[1]}: give width and height in pixels")
                regions = [_region(annotation, names, size, where, settings.task) for annotation in single]
                examples.add(picture_in(root, image["file_name"], where), where, regions, size)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no COCO data set: {type(error).__name__} {error}; export it again") from None
    if by_picture:
        raise DataError(f"{path} has annotations of image {next(iter(by_picture))}, which is not among its images")
    examples.odd += type(examples.odd)()  # counts of 0 go
    return settings.done(examples, found)


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


def _region(annotation: dict[str, Any], names: dict[int, str], size: tuple[int, int], where: str, task: str) -> Region:
    number = annotation["category_id"]
    if number not in names:
        raise DataError(f"{where} has an object of category {number}, which is not among the categories")
    outline = _outline(annotation.get("segmentation"), size, where) if task == "segment" else None
    if "bbox" in annotation:
        x, y, width, height = map(float, annotation["bbox"])
        box = (x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1])
    elif isinstance(outline, tuple):
        box = box_around(outline)
    else:
        raise DataError(f"{where} has an object without bbox: give one")
    return Region(names[number], box, outline)


def _outline(value: Any, size: tuple[int, int], where: str) -> Outline | None:
    """Polygons [x0, y0, x1, y1, ...], or run lengths as a list or compressed text; None when there are none."""
    if not value:
        return None
    if isinstance(value, dict):
        height, width = value["size"]
        counts = value["counts"]
        if (width, height) != size:
            raise DataError(f"{where} has a mask of {width} x {height} and is {size[0]} x {size[1]}: export it again")
        lengths = read_counts(counts) if isinstance(counts, str) else np.array(counts, np.int64)
        return Runs(lengths.astype(np.int32), height, width)
    polygons = [np.array(polygon, np.float32).reshape(-1, 2) / np.array(size, np.float32) for polygon in value]
    return tuple(polygon for polygon in polygons if len(polygon) > 2) or None
