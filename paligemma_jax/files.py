"""Small helpers around files: JSON, replacing a file whole, names that are new, progress on stderr."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import CheckpointError


def data_folder(name: str) -> Path:
    """Where what is shipped beside the code lies: "configs" or "assets", of an installed package or of a checkout."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home directory for a leading ~ or ~user; other names with a tilde stay as they are."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # no possible name of a user: a null character in it
        return Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError when the file is missing or holds something else."""
    try:
        if path.exists() and not path.is_file():  # a pipe would keep the reader waiting
            raise OSError(errno.EINVAL, "not a regular file")
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): it must be a file") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not valid JSON ({error})".replace("\n", " ")) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__} instead of an object")
    return value


def read_text(path: Path) -> str:
    """The text of a UTF-8 file as it is, without a byte order mark; OSError, UnicodeDecodeError."""
    return path.read_bytes().decode("utf-8-sig")


def read_lines(path: Path) -> list[str]:
    r"""The lines of a text file: what ends with \n or \r\n, and nothing else; errors as of `read_text`.

    Python's `str.splitlines` would also split at U+2028, U+0085, form feed and others, which are part of a line's text.
    """
    lines = read_text(path).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; what UTF-8 cannot say, of odd file names, becomes a question mark."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a plain .npy, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, of numbers or texts, under their names as a .npz, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


_WHOLE = 2**26  # bytes of a file up to which all of them count
_BLOCKS, _BLOCK = 256, 2**16  # of a larger one: so many, evenly spread


def digest(path: Path) -> bytes:
    """SHA-256 of the contents of a file; of one above 64 MiB, of 16 MiB that are evenly spread.

    To hash all of a large model would take longer than to load it.
    """
    size = path.stat().st_size
    found = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.digest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to it when the block ends well, removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`, which it replaces when the block ends well; it is removed otherwise.

    At every moment a whole folder is there: the old one or the new one at `path`, or, between two renames, both beside
    it, from where `recover_folder` brings the old one back.
    """
    recover_folder(path)
    temporary, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(path)


def recover_folder(path: Path) -> None:
    """Bring back the folder that a process was killed while replacing (`replacing_folder`), and remove what is left."""
    temporary, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    for left in (temporary, old):
        if left.exists():
            shutil.rmtree(left)


def remove_leftovers(path: Path, after_s: float = 3600.0) -> None:
    """Remove the temporary files of `replacing(path)` that killed processes left: those untouched for an hour."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - left.stat().st_mtime > after_s:
                left.unlink()


class Stems:
    """File names without suffix of which no two are the same, whatever the case."""

    def __init__(self, is_taken: Callable[[str], bool] = lambda stem: False):
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}
        self._is_taken = is_taken  # by something else

    def take(self, stem: str) -> None:
        """Say that a stem is in use."""
        self._taken.add(stem.casefold())

    def new(self, stem: str) -> str:
        """The stem itself, or with the first number that makes it new."""
        unique, count = stem, self._counts.get(stem.casefold(), 1)
        while unique.casefold() in self._taken or self._is_taken(unique):
            count += 1
            unique = f"{stem}_{count}"
        self._counts[stem.casefold()] = count
        self.take(unique)
        return unique


_FIRST_REPORT_S = 2.0  # a load that is over sooner says nothing
_LOG_EVERY_S = 10.0  # when stderr is a file


@contextlib.contextmanager
def progress(label: str, total_bytes: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield `advance(number_of_bytes)`, callable from any thread; a slow transfer is reported on stderr."""
    live = sys.stderr.isatty()
    start = time.monotonic()
    done, shown_at, lock = 0, start, threading.Lock()

    def show() -> None:
        text = f"{label}: {done / 1e9:.1f} of {total_bytes / 1e9:.1f} GB, {time.monotonic() - start:.0f} s"
        print(f"\r{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    def advance(number_of_bytes: int) -> None:
        nonlocal done, shown_at
        with lock:
            done += number_of_bytes
            now = time.monotonic()
            if enabled and now - start >= _FIRST_REPORT_S and now - shown_at >= (0.2 if live else _LOG_EVERY_S):
                shown_at = now
                show()

    yield advance
    if live and shown_at > start:
        show()
        print(file=sys.stderr)
