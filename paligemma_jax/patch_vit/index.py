"""A folder's pictures as embeddings in one file, for search: made once, and brought up to date by content.

The file is safetensors: `student` and `teacher` f32 [N, D], unit vectors; `files`, JSON as bytes, with path, SHA-256,
size, time of change and problem of each picture, those with embeddings first, in the order of these; and in the
metadata what the index is of and by which models.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.checkpoints import tensor_files
from paligemma_jax.errors import CheckpointError, DataError, NumericsError
from paligemma_jax.files import remove_leftovers
from paligemma_jax.processing.decode import decode
from paligemma_jax.processing.image import opened

VERSION = 1
_KEY = "patch_vit_index"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A picture when it was looked at; `problem` says why it has no embedding, "" where it has one.

    size in bytes and time of change in ns tell at small cost whether it may have changed since.
    """

    path: str
    sha256: str
    size: int
    changed: int
    problem: str = ""

    @property
    def seen_as(self) -> tuple[str, int, int]:
        return self.path, self.size, self.changed


@dataclasses.dataclass(frozen=True)
class Index:
    """Embeddings of pictures.

    source: the folder or glob.
    models: a name for each model of what it depends on, such as a digest of its files.
    entries: N pictures with embeddings, in the order of the rows.
    student, teacher: unit vectors, f32 [N, D].
    failed: pictures that could not be read.
    is_complete: False where indexing was stopped.
    """

    source: str
    models: Mapping[str, str]
    entries: Sequence[Entry]
    student: np.ndarray
    teacher: np.ndarray
    failed: Sequence[Entry] = ()
    is_complete: bool = True


@dataclasses.dataclass(frozen=True)
class Staleness:
    """How many pictures came, changed and went since an index was made."""

    added: int
    changed: int
    removed: int
    is_complete: bool = True

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or not self.is_complete)

    def __str__(self) -> str:
        counts = {"added": self.added, "changed": self.changed, "removed": self.removed}
        said = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join(said + ["indexing was not finished"] * (not self.is_complete))


def stamp(path: str) -> tuple[str, int, int]:
    """`Entry.seen_as` of a file now; OSError."""
    stat = os.stat(path)
    return path, stat.st_size, stat.st_mtime_ns


def staleness(index: Index, names: Iterable[str]) -> Staleness:
    """Compare an index with the files that are there, without reading them."""
    known = {entry.path: entry for entry in (*index.entries, *index.failed)}
    names = set(names)
    both = names & known.keys()
    changed = sum(not _is_unchanged(known[name]) for name in both)
    return Staleness(len(names) - len(both), changed, len(known) - len(both), index.is_complete)


def _is_unchanged(entry: Entry) -> bool:
    try:
        return stamp(entry.path) == entry.seen_as
    except OSError:
        return False


def look(path: str, seen_as: tuple[str, int, int]) -> tuple[Entry, bytes]:
    """Read a file: its entry, stamped as it was before, and its contents; ImageError."""
    with opened(Path(path)) as file:
        contents = file.read()
    return Entry(path, hashlib.sha256(contents).hexdigest(), *seen_as[1:]), contents


def picture(entry: Entry, contents: bytes) -> Image.Image:
    """The picture of a file; ImageError."""
    return decode(io.BytesIO(contents), entry.path)


def unit(vectors: np.ndarray, what: str) -> np.ndarray:
    """Vectors [..., D] scaled to length 1, f32; NumericsError where one has none."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise NumericsError(f"{what} are zero or not finite: the weights are damaged, get them again")
    return vectors / lengths


def save(path: Path, index: Index) -> None:
    """Write an index, whole or not at all."""
    files = [dataclasses.astuple(entry) for entry in (*index.entries, *index.failed)]
    about = {
        "version": VERSION,
        "source": index.source,
        "models": dict(index.models),
        "is_complete": index.is_complete,
    }
    arrays = {
        "student": np.asarray(index.student, np.float32),
        "teacher": np.asarray(index.teacher, np.float32),
        "files": np.frombuffer(json.dumps(files).encode(), np.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)  # they are as large as the index
    tensor_files.write(path, arrays, note={_KEY: json.dumps(about)})


def load(path: Path) -> Index:
    """Read an index; large embeddings stay in the pages of the file.

    Raises:
      DataError: there is none, or the file holds something else, or is damaged.
    """
    try:
        if not path.is_file():
            raise DataError(f"there is no index {path}: set refresh=true and name a folder with image=")
        tensors = tensor_files.read_header(path)
        about = json.loads(tensor_files.read_note(path).get(_KEY, "null"))
        if about is None:
            raise DataError(f"{path} is no index of pictures: name another file with index=")
        if about["version"] != VERSION:
            raise DataError(f"{path} is of version {about['version']!r:.20}, not {VERSION}: set overwrite=true")
        arrays = {name: tensor_files.read(tensors[name]) for name in ("student", "teacher", "files")}
        index = _index(about, arrays)
    except CheckpointError as error:
        raise DataError(f"{error}".replace("download it again", "set overwrite=true to make it again")) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # whatever a damaged file holds
        raise DataError(
            f"{path} is a damaged index ({type(error).__name__}): set overwrite=true to make it again"
        ) from None
    return index


def require(path: Path) -> None:
    """DataError for what cannot even be a damaged index, and so must not be replaced by one."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file with index=")
    with path.open("rb") as file:
        head = file.read(9)
    if head and head[8:9] != b"{":  # safetensors: the size of the header, then JSON
        raise DataError(f"{path} is no index of pictures: name another file with index=")


def _index(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Index:
    """What a file holds, checked; ValueError and the like."""
    entries = [_entry(*fields) for fields in json.loads(arrays["files"].tobytes())]
    failed = [entry for entry in entries if entry.problem]
    student, teacher = arrays["student"], arrays["teacher"]
    if not (student.ndim == teacher.ndim == 2 and student.dtype == teacher.dtype == np.float32):
        raise ValueError("embeddings")
    if not len(student) == len(teacher) == len(entries) - len(failed):
        raise ValueError("number of pictures")
    if not isinstance(about["source"], str) or not isinstance(about["models"], dict):
        raise TypeError("metadata")
    good = [entry for entry in entries if not entry.problem]
    return Index(about["source"], about["models"], good, student, teacher, failed, about["is_complete"] is True)


def _entry(path: str, sha256: str, size: int, changed: int, problem: str) -> Entry:
    if not all(isinstance(text, str) for text in (path, sha256, problem)) or type(size) is not int:
        raise TypeError("entry")
    return Entry(path, sha256, size, int(changed), problem)
