"""Whole JSON files, for the formats that are one."""

import json
import mmap
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from paligemma_jax.errors import DataError
from paligemma_jax.files import read_text

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(strict=False)


def load(path: Path) -> Any:
    """What a file holds; DataError when it is missing or no JSON."""
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def items(path: Path, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The items of some lists of a file's object, one by one: all at once would take several times the file's size.

    Yields:
      The name of a list and an item of it; for each list its name and None before that.

    Raises:
      DataError: the file is missing, or no JSON object.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            text = str(data, "utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:  # it is empty, or no UTF-8
        raise _damaged(path, error) from None
    try:
        yield from _items(text, names)
    except (ValueError, IndexError, RecursionError) as error:
        raise _damaged(path, error) from None


def _items(text: str, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    def behind(place: int, marks: str) -> tuple[str, int]:
        """The next mark, and the beginning of what follows it."""
        place = _SPACE.match(text, place).end()
        if text[place] not in marks:
            raise ValueError(f"expected one of {marks} at character {place}")
        return text[place], _SPACE.match(text, place + 1).end()

    mark, place = behind(0, "{")
    if text[place] == "}":
        return
    while mark != "}":
        name, place = _DECODER.raw_decode(text, place)
        _, place = behind(place, ":")
        if name in names and text[place] == "[":
            yield name, None
            mark, place = behind(place, "[")
            if text[place] == "]":
                mark, place = behind(place, "]")
            while mark != "]":
                item, place = _DECODER.raw_decode(text, place)
                yield name, item
                mark, place = behind(place, ",]")
        else:
            _, place = _DECODER.raw_decode(text, place)
        mark, place = behind(place, ",}")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}): give a data set that is there")


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not JSON ({error}): export the data set again")
