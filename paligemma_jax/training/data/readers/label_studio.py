"""Label Studio's JSON export: rectangles and polygons in percent of the picture's sides.

Of a rotated rectangle the box around it is taken. Cancelled annotations, and tasks that have no other, are left out.
Source: https://labelstud.io/guide/export#Label-Studio-JSON-format-of-annotated-tasks.
"""

import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.training.data.detection import polygon_region
from paligemma_jax.training.data.examples import Examples
from paligemma_jax.training.data.found import Found, ReadSettings
from paligemma_jax.training.data.readers import json_file
from paligemma_jax.training.data.regions import Region

_UPLOADED = re.compile(r"[0-9a-f]{8}-")  # what Label Studio writes before the name of an uploaded file
_Row = tuple[str, str, list[Region], tuple[int, int] | None]
_KINDS = ("rectanglelabels", "polygonlabels")


def read(found: Found, settings: ReadSettings) -> Examples:
    """The classes are in alphabetical order.

    Raises:
      DataError: a picture is missing, or a task is not what it should be; it is named.
    """
    path = found.files[0]
    tasks = json_file.load(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DataError(f"{path} is no export of Label Studio: choose JSON when you export")
    root = settings.image_root or found.root
    rows, skipped = [], 0
    for number, task in enumerate(tasks, 1):
        with settings.row():
            row = _task(task, root, f"{path} task {task.get('id', number)}")
            if row is None:
                skipped += 1
            else:
                rows.append(row)
    if skipped:
        settings.tell(f"{path}: {skipped} tasks without an annotation, or with cancelled ones only: left out")
    examples = settings.detection_set(sorted({region.label for _, _, regions, _ in rows for region in regions}))
    for row in rows:
        with settings.row():
            examples.add(*row)
    return settings.done(examples, found)


def _task(task: dict[str, Any], root: Path, where: str) -> _Row | None:
    """The picture of a task, where it is written, its objects, and its size; None when nobody has annotated it."""
    if "annotations" not in task:
        raise DataError(f"{where} has no annotations: choose JSON when you export, not JSON-MIN")
    try:
        done = [one for one in task["annotations"] if not one.get("was_cancelled")]
        if not done:
            return None
        size, regions = _regions(done[0]["result"], where)
        return _picture(task, root, where), where, regions, size
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is of another form ({type(error).__name__} {error}): export it again") from None


def _regions(results: list[dict[str, Any]], where: str) -> tuple[tuple[int, int] | None, list[Region]]:
    size, regions = None, []
    for result in results:
        kind, value = result["type"], result["value"]
        if kind == "brushlabels":
            raise DataError(f"{where} has brush labels: export the data set as COCO, or draw polygons")
        if kind not in _KINDS:
            continue  # answers in words, and relations
        size = int(result["original_width"]), int(result["original_height"])
        label = " ".join(value[kind][0].split())
        if kind == "polygonlabels":
            regions.append(polygon_region(label, (np.array(value["points"], np.float32) / 100,)))
        else:
            regions.append(Region(label, _box(value, size)))
    return size, regions


def _box(value: dict[str, Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box around a rectangle, which is turned clockwise about its upper left corner."""
    width, height = size
    x, y = value["x"] / 100 * width, value["y"] / 100 * height
    across, down = value["width"] / 100 * width, value["height"] / 100 * height
    angle = math.radians(value.get("rotation") or 0)
    corners = [(0, 0), (across, 0), (0, down), (across, down)]
    xs = [x + u * math.cos(angle) - v * math.sin(angle) for u, v in corners]
    ys = [y + u * math.sin(angle) + v * math.cos(angle) for u, v in corners]
    return min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height


def _picture(task: dict[str, Any], root: Path, where: str) -> str:
    """The picture of a task by the end of its address, with or without what an upload wrote before its name."""
    addresses = [value for value in task["data"].values() if isinstance(value, str)]
    for address in addresses:
        local = parse_qs(urlsplit(address).query).get("d", [""])[0]
        path = unquote(local or urlsplit(address).path).lstrip("/")
        name = path.rpartition("/")[2]
        for candidate in (path, name, _UPLOADED.sub("", name, count=1), str(task.get("file_upload") or "")):
            if candidate and (root / candidate).is_file():
                return str(root / candidate)
    shown = addresses[0] if addresses else ""
    raise DataError(f"{where} shows {shown!r:.80}, which is not in {root}: set image_root to the pictures' folder")
