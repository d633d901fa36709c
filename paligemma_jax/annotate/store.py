"""The rows of a run on disk, in a state from which the run can go on whenever it is killed.

In the folder are `rows-00000.jsonl` (or `.parquet`) and so on, each with the rows of as many pictures, in the order of
the inputs; and `state/`:

    manifest.json   what the run is: its fingerprint, pictures, and pictures in a shard
    00000.journal   of a shard that is unfinished: {"items", "rows"} on each line, of pictures that were done together
    00000.done      of a shard that is: name, size and SHA-256 of its file, and how many pictures failed
    lock            held by the process that writes

A shard is written to a temporary name, flushed to the disk, and renamed; then its mark is written likewise; then its
journal is removed. So whatever is missing of these at the next start can be made from what is there: a journal whose
last line is torn loses that line only, a shard without a mark is written again, a mark beside a journal means that all
is done.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.annotate import fingerprint as fingerprints
from paligemma_jax.annotate import rows as records
from paligemma_jax.annotate.rows import Row
from paligemma_jax.errors import DataError
from paligemma_jax.files import read_json, replacing


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is cut in shards.

    pictures: of the run.
    shard_size: pictures whose rows share a file.
    shard_format: of `rows.FORMATS`.
    """

    pictures: int
    shard_size: int
    shard_format: str

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.pictures // self.shard_size)

    def items(self, shard: int) -> range:
        """The numbers of the pictures of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.pictures))


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures of a shard that are answered together, by their numbers in the run."""

    shard: int
    items: tuple[int, ...]


class Store:
    """Rows on disk. Only one process at a time has a folder open.

    Args:
      directory: where the files go; made if it is not there.
      fingerprint: of the run; one that is there already must have the same.
      layout: as for the fingerprint.
      overwrite: begin anew where the folder has another run.
      tell: called with a line about what was found damaged.

    Attributes:
      done: pictures that have their rows, good or failed.
      failed: those of them with a row that failed.

    Raises:
      DataError: the folder has another run, or one that is going on.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Mapping[str, Any],
        layout: Layout,
        overwrite: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self._directory, self._state = directory, directory / "state"
        self._layout = layout
        self._state.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self._state / "lock", directory)
        try:
            self._begin(dict(fingerprint) | dataclasses.asdict(layout), overwrite)
            for path in (*directory.glob(".rows-*.tmp"), *self._state.glob(".*.tmp")):
                path.unlink()  # of a process that was killed
            self._failed: dict[int, int] = {}  # pictures, by shard that is done
            for shard in range(layout.shards):
                self._look_at(shard, tell)
            self._started = {shard: self._in_journal(shard) for shard in self._unfinished() if self._has_journal(shard)}
            for shard in [shard for shard in self._started if self._is_whole(shard)]:
                self._finish(shard)
            self._count()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pending(self, size: int) -> Iterator[Group]:
        """What is to be done, in order: up to `size` pictures of a shard at once, the same ones after every kill."""
        for shard in self._unfinished():
            known, _ = self._started.get(shard, (set(), 0))
            items = [item for item in self._layout.items(shard) if item not in known]
            for start in range(0, len(items), size):
                yield Group(shard, tuple(items[start : start + size]))

    def add(self, group: Group, rows: Sequence[Sequence[Row]]) -> None:
        """Keep the rows of each picture of a group; with the last of its shard the shard is written."""
        line = json.dumps({"items": group.items, "rows": rows}) + "\n"
        with self._journal(group.shard).open("ab") as file:
            file.write(line.encode())
        items, failed = self._started.setdefault(group.shard, (set(), 0))
        items.update(group.items)
        new = sum(map(_has_failed, rows))
        self._started[group.shard] = items, failed + new
        self.done, self.failed = self.done + len(group.items), self.failed + new
        if self._is_whole(group.shard):
            self._finish(group.shard)

    def retry_failed(self) -> int:
        """Take the pictures with failed rows as not done; returns how many there are."""
        count = 0
        for shard in range(self._layout.shards):
            if shard in self._failed:
                if not self._failed[shard]:
                    continue
                rows, path = records.read(self._file(shard)), self._journal(shard)
                items = self._layout.items(shard)
                each = len(rows) // len(items)
                known = [(item, rows[i * each : (i + 1) * each]) for i, item in enumerate(items)]
            elif shard in self._started:
                known, path = self._read_journal(shard), self._journal(shard)
            else:
                continue
            good = [(item, rows) for item, rows in known if not _has_failed(rows)]
            count += len(known) - len(good)
            line = json.dumps({"items": [item for item, _ in good], "rows": [rows for _, rows in good]}) + "\n"
            _write(path, lambda temporary, line=line: temporary.write_text(line, encoding="utf-8"))
            self._mark(shard).unlink(missing_ok=True)  # only now: a mark beside a journal means that all is done
            self._failed.pop(shard, None)
            self._started[shard] = {item for item, _ in good}, 0
        self._count()
        return count

    def rows(self) -> Iterator[Row]:
        """The rows of all shards that are done, in order; one shard is in memory at a time."""
        for shard in sorted(self._failed):
            yield from records.read(self._file(shard))

    def _count(self) -> None:
        finished = sum(len(self._layout.items(shard)) for shard in self._failed)
        self.done = finished + sum(len(items) for items, _ in self._started.values())
        self.failed = sum(self._failed.values()) + sum(failed for _, failed in self._started.values())

    def _begin(self, run: dict[str, Any], overwrite: bool) -> None:
        """Compare with the run that is there, or note this one."""
        path = self._state / "manifest.json"
        if path.exists() and not overwrite:
            changed = fingerprints.differences(read_json(path), run)
            if changed:
                raise DataError(
                    f"{self._directory} has another run, which differs in {fingerprints.named(changed)}: give another "
                    "output_dir, or the same settings to go on, or overwrite=True to begin anew"
                )
            return
        files = [file for form in records.FORMATS for file in self._directory.glob(f"rows-*.{form}")]
        if files and not overwrite:
            remedy = "give another output_dir, or overwrite=True to remove them"
            raise DataError(f"{self._directory} has rows of a run whose {path.name} is gone: {remedy}")
        for old in (*files, *(file for file in self._state.iterdir() if file.name != "lock")):
            old.unlink()
        text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
        _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))

    def _look_at(self, shard: int, tell: Callable[[str], None]) -> None:
        """See whether a shard is done, and its file as it was written."""
        mark = self._mark(shard)
        if not mark.exists():
            return
        known = read_json(mark)
        file = self._directory / str(known.get("file"))
        if file.is_file() and _checksum(file) == known.get("sha256"):
            self._failed[shard] = known["failed"]
            self._journal(shard).unlink(missing_ok=True)
        else:
            tell(f"note: {file} is damaged, changed or gone: its pictures are asked about again")
            self._journal(shard).unlink(missing_ok=True)
            mark.unlink()

    def _finish(self, shard: int) -> None:
        """Write a shard whose journal is complete."""
        known = sorted(self._read_journal(shard))
        file = self._file(shard)
        rows = [row for _, of_item in known for row in of_item]
        _write(file, lambda temporary: records.write(temporary, rows, self._layout.shard_format))
        failed = sum(_has_failed(of_item) for _, of_item in known)
        mark = {"file": file.name, "bytes": file.stat().st_size, "sha256": _checksum(file), "rows": len(rows)}
        text = json.dumps(mark | {"pictures": len(known), "failed": failed}, indent=2) + "\n"
        _write(self._mark(shard), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._journal(shard).unlink()
        del self._started[shard]
        self._failed[shard] = failed

    def _read_journal(self, shard: int) -> list[tuple[int, list[Row]]]:
        """Pictures and their rows; what is torn at the end is cut off the file."""
        path, known, good = self._journal(shard), {}, 0
        with path.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                good += len(line)
                known |= dict(zip(entry["items"], entry["rows"], strict=True))
        if good < path.stat().st_size:
            os.truncate(path, good)
        return list(known.items())

    def _in_journal(self, shard: int) -> tuple[set[int], int]:
        known = self._read_journal(shard)
        return {item for item, _ in known}, sum(_has_failed(rows) for _, rows in known)

    def _unfinished(self) -> list[int]:
        return [shard for shard in range(self._layout.shards) if shard not in self._failed]

    def _is_whole(self, shard: int) -> bool:
        return len(self._started[shard][0]) == len(self._layout.items(shard))

    def _has_journal(self, shard: int) -> bool:
        return self._journal(shard).exists()

    def _file(self, shard: int) -> Path:
        return self._directory / f"rows-{shard:05d}.{self._layout.shard_format}"

    def _mark(self, shard: int) -> Path:
        return self._state / f"{shard:05d}.done"

    def _journal(self, shard: int) -> Path:
        return self._state / f"{shard:05d}.journal"


def _has_failed(rows: Sequence[Row]) -> bool:
    return any(row["status"] == records.FAILED for row in rows)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, and be sure that it is on the disk."""
    with replacing(path) as temporary:
        write(temporary)
        _flush(temporary)
    _flush(path.parent)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def locked(path: Path, directory: Path) -> int | None:
    """An open file that no other process can lock; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DataError(f"another process is writing to {directory}: wait for it, or give another output_dir") from None
    except OSError:  # a file system without locks
        with contextlib.suppress(OSError):
            os.close(handle)
        return None
    return handle
