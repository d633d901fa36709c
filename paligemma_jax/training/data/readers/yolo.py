"""YOLO: a data.yaml with names, folders of pictures, and for each picture a text file of labels.

A line of labels is `class cx cy w h`, or `class x0 y0 x1 y1 x2 y2 ...` of a polygon, as shares of the picture's sides.
The labels of `images/1.png` are in `labels/1.txt`; a picture without that file shows none of the classes.
Source: https://docs.ultralytics.com/datasets/detect/ and /segment/.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.files import read_lines, read_text
from paligemma_jax.processing.find import find_images
from paligemma_jax.training.data.detection import polygon_region
from paligemma_jax.training.data.examples import Examples
from paligemma_jax.training.data.found import Found, ReadSettings
from paligemma_jax.training.data.regions import Region

SPLITS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}
_BOX = 5  # values of a line


def read(found: Found, settings: ReadSettings) -> Examples:
    """Raises DataError: names, a folder or a label is not what it should be; the line is named."""
    path = found.files[0]
    fields = load_yaml(path)
    names = _names(fields.get("names"), path)
    examples = settings.detection_set(names.values())
    for picture, labels in _pairs(found, settings):
        with settings.row():
            lines = read_lines(labels) if labels.is_file() else []
            numbered = [(line, f"{labels} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
            examples.add(picture, picture, [_region(line, names, where) for line, where in numbered])
    return settings.done(examples, found)


def files(found: Found) -> list[Path]:
    """What examples depend on: the labels of each picture, or the picture that has none."""
    pairs = _pairs(found, ReadSettings())
    return [found.files[0], *(labels if labels.is_file() else Path(picture) for picture, labels in pairs)]


def splits(path: Path) -> list[str]:
    """The splits that a data.yaml names, when its folders are there."""
    fields = load_yaml(path)
    return [split for split, keys in SPLITS.items() if any(_folders(path, fields, key) for key in keys)]


def load_yaml(path: Path) -> dict[str, Any]:
    """What a data.yaml holds; DataError when it is none."""
    try:
        import yaml
    except ImportError:
        raise DataError('data in YOLO\'s form need PyYAML: pip install -e ".[train]"') from None
    try:
        fields = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is no YAML ({' '.join(str(error).split())}): write it as YOLO's data.yaml") from None
    if not isinstance(fields, dict) or "names" not in fields:
        raise DataError(f"{path} has no names: give YOLO's data.yaml, which names the classes")
    return fields


def _names(value: Any, path: Path) -> dict[int, str]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not all(isinstance(number, int) for number in value):
        raise DataError(f"{path} has names of another form: give a list, or a name for each number")
    return {number: str(value[number]) for number in sorted(value)}


def _folders(path: Path, fields: dict[str, Any], key: str) -> list[Path]:
    """Folders of pictures, or text files that list some, of a split; [] when they are not there."""
    value = fields.get(key) or []
    entries = [value] if isinstance(value, str) else [entry for entry in value if isinstance(entry, str)]
    found = []
    for entry in entries:
        base = path.parent / str(fields.get("path") or "")
        # Roboflow's ../train/images is meant from a folder beside the data set's own
        candidates = [base / entry, path.parent / entry, path.parent / entry.removeprefix("../")]
        found += [folder for folder in candidates if folder.exists()][:1]
    return found


def _pairs(found: Found, settings: ReadSettings) -> Iterator[tuple[str, Path]]:
    """Each picture of a split and the file of its labels, in a fixed order."""
    path = found.files[0]
    fields = load_yaml(path)
    folders = [folder for key in SPLITS[found.split or "train"] for folder in _folders(path, fields, key)]
    if not folders:
        raise DataError(f"{path} names no folder for {found.split}, or one that is not there: correct its paths")
    for folder in folders:
        if folder.is_file():
            names = [str(folder.parent / line.strip()) for line in read_lines(folder) if line.strip()]
            if missing := [name for name in names if not Path(name).is_file()]:
                raise DataError(f"{folder} names {missing[0]}, which is missing: correct the list")
        else:
            names = find_images(str(folder))
        for name in names:
            yield name, _labels_of(Path(name))


def _labels_of(picture: Path) -> Path:
    parts = list(picture.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            return Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
    return picture.with_suffix(".txt")


def _region(line: str, names: dict[int, str], where: str) -> Region:
    try:
        number, *values = map(float, line.split())
    except ValueError:
        raise DataError(f"{where} is {line!r:.60}: give a class and numbers") from None
    if number not in names:
        raise DataError(f"{where} has class {number:g}, which has no name in data.yaml: add it to names")
    if any(abs(value) > 2 for value in values):
        raise DataError(f"{where} has {max(values, key=abs):g}: coordinates are shares of the picture's sides, 0 to 1")
    if len(values) == _BOX - 1:
        cx, cy, width, height = values
        return Region(names[int(number)], (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
    if len(values) < 6 or len(values) % 2:
        raise DataError(f"{where} has {len(values)} numbers behind its class: give 4 of a box, or pairs of a polygon")
    return polygon_region(names[int(number)], (np.array(values, np.float32).reshape(-1, 2),))
