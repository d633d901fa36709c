"""JSON lines with `image` (a path or a list of them), `prefix` and `suffix`: ours, and Roboflow's PaliGemma exports.

The file is mapped, and a line is taken apart when its example is asked for: memory holds where lines begin.
"""

import array
import contextlib
import difflib
import json
import mmap
import os
from pathlib import Path

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.training.data.examples import Example, Examples, check_on_disk, make_example, token_bound
from paligemma_jax.training.data.found import Found, ReadSettings

_KEYS = ("image", "prefix", "suffix")
_ALLOWED = set(_KEYS)
_DECODER = json.JSONDecoder(strict=False)  # a form feed or tab in a string does no harm
_PEEK = 2**16  # bytes of a first line that are looked at
_MARK = b"\xef\xbb\xbf"  # byte order mark


class JsonLines(Examples):
    """The examples of a file; every line is checked when it is opened.

    Raises:
      DataError: the file or a picture is missing, or a line is not what it should be; the line is named.
    """

    def __init__(self, path: Path, root: Path, settings: ReadSettings):
        self._path, self._root = path, str(root)
        self._starts, self._numbers = array.array("q"), array.array("q")
        bounds = array.array("i")
        try:
            with path.open("rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0
                self._data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _unreadable(path, error) from None
        start = len(_MARK) if self._data[: len(_MARK)] == _MARK else 0
        number = 0
        while start < len(self._data):
            number += 1
            end = self._data.find(b"\n", start)
            end = len(self._data) if end < 0 else end
            if self._data[start:end].strip():
                try:
                    example = self._read(start, end, number)
                    check_on_disk(example)
                except DataError as error:
                    settings.bad_row(error)
                else:
                    self._starts.append(start)
                    self._numbers.append(number)
                    bounds.extend((len(example.images), token_bound(example.prefix), token_bound(example.suffix)))
            start = end + 1
        if not number or not self._starts:
            raise DataError(f"{path} is empty: give one JSON object with image, prefix and suffix on each line")
        self._bounds = np.array(bounds, np.int32).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, index: int) -> Example:
        start = self._starts[index]
        end = self._data.find(b"\n", start)
        return self._read(start, len(self._data) if end < 0 else end, self._numbers[index])

    def bounds(self) -> np.ndarray:
        return self._bounds

    def _read(self, start: int, end: int, number: int) -> Example:
        where = f"{self._path} line {number}"
        try:
            line = self._data[start:end].decode()
        except UnicodeDecodeError as error:
            raise _unreadable(self._path, error) from None
        images, prefix, suffix = _fields(line, where)
        return make_example(tuple(os.path.join(self._root, image) for image in images), prefix, suffix, where)


def read(found: Found, settings: ReadSettings) -> Examples:
    return JsonLines(found.files[0], settings.image_root or found.root, settings)


def is_rows(path: Path) -> bool:
    """Whether the first line of a file is a JSON object with an image, a prefix and a suffix, whatever is in them."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        value = json.loads(file.readline(_PEEK).removeprefix(_MARK))
        return isinstance(value, dict) and value.keys() >= set(_KEYS)
    return False


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error}): give a .jsonl file as data")


def _fields(line: str, where: str) -> tuple[list[str], str, str]:
    """The paths, prefix and suffix of a line."""
    try:
        value = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__} instead of an object")
    if "messages" in value:
        raise DataError(f"{where} is of an export for OpenAI: export the data set from Roboflow again, as PaliGemma")
    if not value.keys() <= _ALLOWED:
        unknown = next(key for key in value if key not in _ALLOWED)
        close = difflib.get_close_matches(unknown, _KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"a line has {', '.join(_KEYS)} only"
        raise DataError(f"{where} has an unknown key {unknown!r}: {hint}")
    images = value.get("image")
    images = images if isinstance(images, list) else [images]
    prefix, suffix = value.get("prefix"), value.get("suffix")
    if not images or {type(text) for text in (*images, prefix, suffix)} != {str}:
        raise DataError(f"{where} needs image (a path or a list of paths), prefix and suffix (texts)")
    return images, prefix, suffix
