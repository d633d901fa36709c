"""CSV and TSV with the columns image, prefix and suffix; several pictures are a JSON list in the image column.

Records may hold line breaks in quotes; where each begins is kept, and it is read when its example is asked for.
"""

import array
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from paligemma_jax.errors import DataError, one_line
from paligemma_jax.training.data.examples import Example, Examples, check_on_disk, make_example, sizes_of
from paligemma_jax.training.data.found import Found, ReadSettings
from paligemma_jax.training.data.readers.pieces import Pieces

_COLUMNS = ("image", "prefix", "suffix")


class Table(Examples):
    """The examples of a file; every record is checked when it is opened.

    Raises:
      DataError: the file or a picture is missing, or a record is not what it should be; it is named.
    """

    def __init__(self, path: Path, root: Path, settings: ReadSettings):
        self._path, self._root = path, str(root)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._starts, self._sizes, self._numbers = array.array("q"), array.array("i"), array.array("q")
        bounds = array.array("i")
        try:
            self._pieces = Pieces(path)
            with path.open("rb") as file:
                records = self._records(file)
                start, header = next(records, (0, []))
                self._places = self._columns([name.strip().lower() for name in header])
                for number, (end, record) in enumerate(records, 1):
                    with settings.row():
                        example = self._example(record, number)
                        check_on_disk(example)
                        self._starts.append(start)
                        self._sizes.append(end - start)
                        self._numbers.append(number)
                        bounds.extend(sizes_of(example))
                    start = end
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path} cannot be read ({one_line(error)}): give a UTF-8 CSV file with records") from None
        if len(self) == 0:
            raise DataError(f"{path} is empty: give a record with image, prefix and suffix on each line")
        self._bounds = np.array(bounds, np.int32).reshape(-1, 3)

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
        """Each record and the byte behind it; empty lines belong to the next one."""
        position = 0

        def lines() -> Iterator[str]:
            nonlocal position
            for line in file:
                text = line.decode("utf-8" if position else "utf-8-sig")
                position += len(line)
                yield text

        for record in csv.reader(lines(), delimiter=self._delimiter):
            if record:
                yield position, record

    def _columns(self, header: list[str]) -> list[int]:
        if missing := [name for name in _COLUMNS if name not in header]:
            boxes = ": for boxes in CSV, export the data set as COCO instead" if "xmin" in header else ""
            raise DataError(f"{self._path} has no column {missing[0]!r}{boxes or ': its first line has to name it'}")
        if unknown := [name for name in header if name not in _COLUMNS]:
            raise DataError(f"{self._path} has an unknown column {unknown[0]!r}: there are {', '.join(_COLUMNS)} only")
        return [header.index(name) for name in _COLUMNS]

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, index: int) -> Example:
        text = self._pieces.read(self._starts[index], self._sizes[index]).decode()
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter)
        return self._example(next(row for row in rows if row), self._numbers[index])

    def bounds(self) -> np.ndarray:
        return self._bounds

    def _example(self, record: list[str], number: int) -> Example:
        where = f"{self._path} record {number}"
        if len(record) != len(_COLUMNS):
            raise DataError(f"{where} has {len(record)} fields instead of {len(_COLUMNS)}: put texts in quotes")
        image, prefix, suffix = (record[place] for place in self._places)
        try:
            images = json.loads(image) if image.startswith("[") else [image]
        except ValueError:
            images = []
        if not images or not all(isinstance(name, str) and name for name in images):
            raise DataError(f"{where} needs image (a path, or a JSON list of paths)")
        return make_example(tuple(os.path.join(self._root, name) for name in images), prefix, suffix, where)


def read(found: Found, settings: ReadSettings) -> Examples:
    return Table(found.files[0], settings.image_root or found.root, settings)
