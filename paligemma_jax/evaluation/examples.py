"""What is asked about which pictures, and what is right."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.files import read_lines, read_text
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.detections import Detections
from paligemma_jax.tasks.run_lengths import decode_runs, read_runs


@dataclasses.dataclass(frozen=True)
class Objects:
    """True objects of a picture, as COCO writes them.

    size: (width, height) in pixels.
    labels, boxes: of each object; x, y, width and height in pixels.
    segmentations: polygons or run lengths of each, () when masks are not needed.
    """

    size: tuple[int, int]
    labels: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    segmentations: tuple[Any, ...] = ()

    def detections(self) -> Detections:
        """Boxes by their corners, with masks where there are segmentations; ConfigError without pycocotools then."""
        masks = [to_mask(part, self.size) for part in self.segmentations] or [None] * len(self.boxes)
        corners = [(x, y, x + w, y + h) for x, y, w, h in self.boxes]
        return Detections(map(_detection, self.labels, corners, masks), self.size)


def _detection(label: str, box: tuple[float, ...], mask: np.ndarray | None) -> Detection:
    return Detection(label, box, mask=mask)


def to_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """COCO's polygons, run lengths, or compressed run lengths to bool [H, W]."""
    if not isinstance(segmentation, list):
        return decode_runs(read_runs(segmentation))
    tools, (width, height) = coco.require(), size
    encoded = tools.merge(tools.frPyObjects(segmentation, height, width))  # an object's polygons are its parts
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # pycocotools 2.0 under numpy 2
        return tools.decode(encoded).astype(bool)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt about a picture, or about several seen together.

    id: of the question or picture, as the data set numbers it.
    images: paths.
    fields: what the task's prompt is made of, by name.
    reference: the right answer, several of them, or the true objects.
    group: part of the data set that is reported apart, "" for none.
    """

    id: str
    images: tuple[str, ...]
    fields: Mapping[str, str]
    reference: str | tuple[str, ...] | Objects
    group: str = ""


def load_json(path: Path) -> Any:
    """What a JSON file holds; DataError when it is missing or damaged."""

    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: docs/evaluation.md shows how this data set lies on disk") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): it must be a file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})".replace("\n", " ")) from None


def load_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; DataError names the line that holds none."""

    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: docs/evaluation.md shows how this data set lies on disk") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): it must be a text file") from None
    rows = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path} line {i} is not JSON ({error})") from None
        if not isinstance(rows[-1], dict):
            raise DataError(f"{path} line {i} holds a JSON {type(rows[-1]).__name__} instead of an object")
    return rows


def first_of(root: Path, names: Sequence[str]) -> Path:
    """The first of some files or folders that is there; DataError names them all when none is."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise DataError(f"{root} has no {' or '.join(names)}: docs/evaluation.md shows how this data set lies on disk")


def check_pictures(examples: Sequence[Example]) -> None:
    """Make sure that all pictures are there, since a part of a data set would give another number.

    Raises:
      DataError: some are missing; the first is named.
    """
    names = dict.fromkeys(name for example in examples for name in example.images)
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        count = f"{len(missing):,} of {len(names):,} pictures are missing"
        raise DataError(f"{missing[0]} is missing ({count}): docs/evaluation.md shows how this data set lies on disk")


def field(row: Any, name: Any, path: Path) -> Any:
    """A field of an object out of a file; DataError names both when it is not there."""
    if not isinstance(row, Mapping) or name not in row:
        raise DataError(f"{path} has an entry without {name!r}: docs/evaluation.md shows what the file must hold")
    return row[name]


def grouped(rows: Sequence[Any], name: str, path: Path) -> dict[Any, list[Any]]:
    """Rows by the value of one of their fields, in the order of the file."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(field(row, name, path), []).append(row)
    return groups
