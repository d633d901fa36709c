"""Data as a user names them, one set or several with weights, to examples."""

import bisect
import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.files import digest, expanded
from paligemma_jax.training.data.detection import DetectionSet, Encode
from paligemma_jax.training.data.examples import Example, Examples
from paligemma_jax.training.data.found import TASKS, Found, ReadSettings
from paligemma_jax.training.data.locate import locate, splits_of
from paligemma_jax.training.data.readers import arrow, coco, jsonl, label_studio, table, voc, yolo

READERS: dict[str, ModuleType] = {
    "jsonl": jsonl,
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "label_studio": label_studio,
    "csv": table,
    "datasets": arrow,
}
_WEIGHT = re.compile(r"(\d+(?:\.\d+)?|\d+/\d+)\s+(\S.*)")

Spec = str | Path | Sequence[str | Path | tuple[str | Path, float]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that is named, and how often each of its examples is shown in an epoch."""

    path: Path
    weight: Fraction = Fraction(1)


class Data(Examples):
    """The examples of one data set or several, one after another.

    parts, weights: of each, see `Source`.
    """

    def __init__(self, parts: Sequence[Examples], weights: Sequence[Fraction]):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def _part(self, index: int) -> tuple[Examples, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    def at(self, index: int) -> Example:
        part, place = self._part(index)
        return part.at(place)

    def draft(self, index: int) -> Example:
        part, place = self._part(index)
        return part.draft(place)

    def bounds(self) -> np.ndarray:
        return np.concatenate([part.bounds() for part in self.parts])


def read_spec(spec: Spec) -> list[Source]:
    """The data sets that a text or a list names.

    A text has their paths, joined by ";", each perhaps after its weight: "a.jsonl ; 0.5 b.jsonl". Of a list, an item is
    a path, or a pair of a path and a weight.

    Raises:
      ConfigError: a weight that is no number above 0, or nothing is named.
    """
    if isinstance(spec, str | Path):
        whole = expanded(spec)
        items = [whole] if str(spec).strip() and whole.exists() else str(spec).split(";")
        sources = [_read_item(str(item).strip()) for item in items if str(item).strip()]
    else:
        pairs = [item if isinstance(item, tuple) and len(item) == 2 else (item, 1) for item in spec]
        sources = [Source(expanded(path), _weight(str(weight), str(path))) for path, weight in pairs]
    if not sources:
        raise ConfigError("no data are named: give a .jsonl file, or the folder of a data set")
    return sources


def _read_item(item: str) -> Source:
    if (match := _WEIGHT.fullmatch(item)) and not expanded(item).exists():
        return Source(expanded(match[2]), _weight(match[1], match[2]))
    return Source(expanded(item))


def _weight(text: str, path: str) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise ConfigError(f"weight {text} of {path} is not possible: give a number above 0")
    return weight


def open_data(
    spec: Spec,
    image_root: str | Path = "",
    *,
    split: str = "train",
    data_format: str = "auto",
    task: str = "auto",
    encode: Encode | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Data:
    """The examples of data sets, checked, but for their pictures; each is read when it is asked for.

    Args:
      spec: see `read_spec`.
      image_root: folder that pictures are named from; by default the data set's own.
      split: which part of those that have parts: "train", "valid" or "test".
      data_format: "auto", or a key of `READERS`.
      task: what objects become: "detect", "segment" (with mask codes), or "auto", which is detect.
      encode: masks to codes, for segment; see `masks.MaskCodec`.
      tell: called with a line about what was put right or passed over.

    Raises:
      ConfigError, DataError: something is not there or not what it should be; it is named.
    """
    check_choices(data_format, task)
    settings = ReadSettings(expanded(image_root) if image_root else None, task, encode, tell)
    sources = read_spec(spec)
    parts = [_open(locate(source.path, split, data_format), settings) for source in sources]
    if task == "segment" and not any(isinstance(part, DetectionSet) for part in parts):
        raise ConfigError("data_task=segment is for data sets with outlines, and these hold texts: leave it out")
    return Data(parts, [source.weight for source in sources])


def open_found(found: Found, image_root: str | Path = "", **settings: object) -> Examples:
    """The examples of one split; `settings` are those of `ReadSettings`."""
    return _open(found, ReadSettings(expanded(image_root) if image_root else None, **settings))


def _open(found: Found, settings: ReadSettings) -> Examples:
    return READERS[found.kind].read(found, settings)


def check_choices(data_format: str, task: str) -> None:
    """ConfigError unless both are known."""
    if data_format not in ("auto", *READERS):
        raise ConfigError(f"data_format={data_format!r} is not possible: give auto, {', '.join(READERS)}")
    if task not in TASKS:
        raise ConfigError(f"data_task={task!r} is not possible: give {', '.join(TASKS)}")


def fingerprint(spec: Spec, *, split: str = "train", data_format: str = "auto") -> str:
    """A hash of what examples are read from: texts and labels, not pictures on disk.

    Raises:
      ConfigError, DataError: something is not there.
    """
    found = hashlib.sha256()
    sources = read_spec(spec)
    for source in sources:
        where = locate(source.path, split, data_format)
        reader = READERS[where.kind]
        files = reader.files(where) if hasattr(reader, "files") else list(where.files)
        if len(sources) == len(files) == 1 and source.weight == 1:
            return _hash(files[0])
        found.update(f"{source.weight} {where.kind} {len(files)}\n".encode())
        for file in files:
            found.update(f"{file.name} ".encode(errors="surrogatepass") + _hash(file).encode())
    return found.hexdigest()


def _hash(path: Path) -> str:
    """Of a file; of an Arrow file, which holds pictures too, a part, see `files.digest`."""
    try:
        if path.suffix == ".arrow":
            return digest(path).hex()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give data that are there") from None


def all_splits(spec: Spec, data_format: str = "auto") -> dict[str, Found]:
    """Every split of the data sets, by a name of its own: "train", or "train of DIR" where several sets are named."""
    sources = read_spec(spec)
    return {
        f"{name or 'data'}{f' of {source.path}' if len(sources) > 1 else ''}": found
        for source in sources
        for name, found in splits_of(source.path, data_format).items()
    }
