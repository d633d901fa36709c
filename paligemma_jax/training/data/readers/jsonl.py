"""JSON lines with `image` (a path or a list of them), `prefix` and `suffix`: ours, and Roboflow's PaliGemma exports.

A line is read when its example is asked for: memory holds where lines begin.
"""

import array
import contextlib
import difflib
import json
import os
from pathlib import Path

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.training.data.examples import Example, Examples, check_on_disk, make_example, sizes_of
from paligemma_jax.training.data.found import Found, ReadSettings
from paligemma_jax.training.data.readers.pieces import Pieces

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
        self._starts, self._sizes, self._numbers = array.array("q"), array.array("i"), array.array("q")
        bounds = array.array("i")
        start = 0
        try:
            self._pieces = Pieces(path)
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip() and line != _MARK:
                        try:
                            example = self._read(line, number)
                            check_on_disk(example)
                        except DataError as error:
                            settings.bad_row(error)
                        else:
                            self._starts.append(start)
                            self._sizes.append(len(line))
                            self._numbers.append(number)
                            bounds.extend(sizes_of(example))
                    start += len(line)
        except OSError as error:
            raise _unreadable(path, error) from None
        if not self._starts:
            raise DataError(f"{path} is empty: give one JSON object with image, prefix and suffix on each line")
        self._bounds = np.array(bounds, np.int32).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, index: int) -> Example:
        line = self._pieces.read(self._starts[index], self._sizes[index])
        return self._read(line, self._numbers[index])

    def bounds(self) -> np.ndarray:
        return self._bounds

    def _read(self, line: bytes, number: int) -> Example:
        where = f"{self._path} line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _unreadable(self._path, error) from None
        images, prefix, suffix = _fields(text, where)
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
