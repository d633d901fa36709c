"""The folder that a run writes to: one run's results, in a state from which it can go on whenever it is killed.

    records.jsonl        a JSON object for each answer, and one with `error` for each picture that could not be read
    .run/settings.json   what the run is: its settings, and the pictures' names as a digest
    .run/progress.jsonl  {"names", "bytes", "failed"} after each batch: pictures that are done, bytes of records.jsonl
    .run/lock            held by the process that writes

Pictures are written before their records, records before the line that says they are done. What follows the last such
line is made again.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from paligemma_jax.annotate.fingerprint import differences, named
from paligemma_jax.annotate.store import locked
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import read_json, write_json, write_text
from paligemma_jax.processing.fetch import is_url

Record = dict[str, Any]

_RECORDS, _RUN, _PROGRESS = "records.jsonl", ".run/settings.json", ".run/progress.jsonl"
_LOCK = ".run/lock"
_OWN = "files"
_STRANGE = ("*_drawn.png", "*_drawn.mp4", "*_mask_*.png", "coco_*.json", "classes.txt", "labels", "fiftyone")
_STRANGE += ("labelstudio_*", _RECORDS, "state", "adapter")
_NUMBER = re.compile(r"_\d+$")
_OTHER = "name another output_dir"
_CHOICE = f"{_OTHER}, or add overwrite=True to begin anew"


class Folder:
    """Records of a run on disk. A folder is only looked at and locked until `begin`.

    Args:
      path: the folder; made if it is not there.
      settings: what the answers depend on; a run that goes on has the same.
      count: pictures of the run.
      resume: go on with the run that is there.
      overwrite: remove the results of the run that is there.

    Attributes:
      done: pictures that are done, failed ones too.
      failed: of these.

    Raises:
      ConfigError: the folder has results, and neither was said; or those of another run.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], count: int, resume: bool, overwrite: bool):
        self.path = path
        self.done = self.failed = 0
        self._size = 0  # bytes of the records of all pictures that are done
        self._settings, self._clears = dict(settings), overwrite
        self._file: BinaryIO | None = None
        if resume and overwrite:
            raise ConfigError("resume and overwrite exclude each other: leave out one of them")
        make_folder((path / _RUN).parent, path)
        self._lock = locked(path / _LOCK, path)
        try:
            self._check(count, resume, overwrite)
        except BaseException:
            self._unlock()
            if not (path / _RUN).exists():  # leave a folder of somebody else as it was
                with contextlib.suppress(OSError):
                    (path / _LOCK).unlink()
                    (path / _LOCK).parent.rmdir()
            raise

    def _check(self, count: int, resume: bool, overwrite: bool) -> None:
        path, known = self.path, self.path / _RUN
        before = read_json(known) if known.exists() else {}
        own = before.pop(_OWN, [])
        if not known.exists() and (strange := self._strange()) is not None:  # no run says that it is its own
            raise ConfigError(f"{path} has {strange.name}, which is of no run that is known here: {_OTHER}")
        if overwrite:
            return
        self._read_progress()
        records = path / _RECORDS
        if known.exists() and not (own or (records.exists() and records.stat().st_size)):
            self._clears = True  # it did nothing
        elif known.exists():
            if changed := differences(before, self._settings):
                raise ConfigError(
                    f"{path} has the results of another run, which differs in {named(changed)}: {_CHOICE}"
                )
            if not resume:
                about = f"{self.done:,} of {count:,} picture{'s' * (count > 1)}"
                raise ConfigError(f"{path} has the results of this run, {about}: add resume=True to go on, {_CHOICE}")

    def _strange(self) -> Path | None:
        """A file that a run might replace."""
        return next((file for pattern in _STRANGE for file in sorted(self.path.glob(pattern))), None)

    def begin(self) -> None:
        """Have the folder ready for records; with `overwrite` it loses those of the other run now."""
        path = self.path
        if self._clears:
            self._clear()
        if not (path / _RUN).exists():
            write_json(path / _RUN, self._settings)
        self._file = (path / _RECORDS).open("ab")
        if self._file.tell() > self._size:
            self._file.truncate(self._size)  # records of pictures that were not finished
            self._file.seek(self._size)
        write_text(path / _PROGRESS, _progress(self.done, self._size, self.failed))  # no line that is torn

    def add(self, record: Record) -> None:
        """Keep a record of the picture that is answered now."""
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace"))
        self.failed += "error" in record

    def mark(self) -> int:
        """Where the next record will begin, for `commit`."""
        return self._file.tell()

    def commit(self, done: int, size: int, failed: int) -> None:
        """Say that so many pictures are done; `size` and `failed` are as they were when they were."""
        self._file.flush()
        self.done = done
        with (self.path / _PROGRESS).open("ab") as file:
            file.write(_progress(done, size, failed).encode())

    def records(self) -> Iterator[Record]:
        """All records, from the first."""
        self._file.flush()
        with (self.path / _RECORDS).open("rb") as file:
            yield from map(json.loads, file)

    def own(self, files: Iterable[Path]) -> None:
        """Note files that were made of the records, so that `overwrite` removes them too."""
        known = read_json(self.path / _RUN)
        names = [str(file.relative_to(self.path)) for file in files]
        write_json(self.path / _RUN, known | {_OWN: list(dict.fromkeys([*known.get(_OWN, ()), *names]))})

    def close(self) -> None:
        """Records can be read still, and none be added."""
        if self._file is not None:
            self._file.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read_progress(self) -> None:
        file, records = self.path / _PROGRESS, self.path / _RECORDS
        size = records.stat().st_size if records.exists() else 0
        for line in file.read_bytes().split(b"\n") if file.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn when the process was killed
                entry = json.loads(line)
                if entry["bytes"] <= size:  # or the machine stopped before the records were on the disk
                    self.done, self._size, self.failed = entry["names"], entry["bytes"], entry["failed"]

    def _clear(self) -> None:
        """Remove what the run that was here has written, and nothing else; the proof that it was here goes last."""
        self.done = self.failed = self._size = 0
        known, records = self.path / _RUN, self.path / _RECORDS
        if not known.exists():
            return
        names, stems = [str(name) for name in read_json(known).get(_OWN, ())], set()
        for line in records.read_bytes().split(b"\n") if records.exists() else ():
            with contextlib.suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    names += map(str, record.get("files") or ())
                    stems.add(str(record.get("stem")))
        (self.path / _PROGRESS).unlink(missing_ok=True)
        for path in (self.path / name for name in names if is_inside(name)):
            labels = path.glob("*.txt") if path.is_dir() else ()
            for file in (*(x for x in labels if x.stem in stems or _NUMBER.sub("", x.stem) in stems), path):
                if not file.is_dir():
                    file.unlink(missing_ok=True)
        for path in (records, known):
            path.unlink(missing_ok=True)


def _progress(done: int, size: int, failed: int) -> str:
    return json.dumps({"names": done, "bytes": size, "failed": failed}) + "\n"


def is_inside(name: str) -> bool:
    """Whether a name that a file on disk gives is of something in the folder, so that it may be removed."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def make_folder(path: Path, named: Path | None = None) -> Path:
    """A folder, made if it is not there; ConfigError, about the one that was `named`, when that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={named or path} is not possible: {error.strerror}; name a folder") from None
    return path


def refuse_inputs(path: Path, names: Iterable[str]) -> None:
    """ConfigError when results would lie among the pictures that they are about."""
    place = path.resolve()
    files = (Path(name) for name in names if not is_url(name))
    if any(file.parent.resolve() == place for file in files):
        raise ConfigError(f"output_dir={path} is the folder of the pictures: {_OTHER}")


def refuse_used(path: Path) -> None:
    """ConfigError when a folder has the results of a run, which drawings of something else would be mixed with."""
    if (path / _RUN).exists():
        raise ConfigError(f"{path} has the results of a run: name another output_dir")
