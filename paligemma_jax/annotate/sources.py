"""Where the pictures of a run lie, and their bytes when they are needed.

Planning a run makes one small value of these for each picture, in a fixed order; `find` in `annotate.inputs` does so.
"""

import base64
import binascii
import csv
import dataclasses
import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from paligemma_jax.errors import ConfigError, ImageError, one_line
from paligemma_jax.files import expanded
from paligemma_jax.processing import fetch
from paligemma_jax.processing.image import opened

MAX_BYTES = 2**29  # of an encoded picture; what is larger is no picture, and would fill the memory

_BOM = "\ufeff"


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A picture at a path or an address.

    name: what the user calls it.
    """

    name: str
    path: str

    def read(self) -> bytes:
        """Its bytes; ImageError when there are none to be had."""
        if fetch.is_url(self.path):
            return fetch.fetch(self.path)
        return _from_file(Path(self.path))


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A picture in an uncompressed tar: the bytes [offset, offset + size) of the file."""

    name: str
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """As `File.read`."""
        data = _from_file(Path(self.file), self.offset, self.size)
        if len(data) < self.size:
            raise ImageError(f"{self.name} is cut off: {self.file} has ended; download it again")
        return data


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A picture in base64 in a CSV file, in the record that begins at byte `offset`."""

    name: str
    file: str
    offset: int
    column: int

    def read(self) -> bytes:
        """As `File.read`."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                _, record = next(csv_records(file, self.file))
            return base64.b64decode("".join(record[self.column].split()), validate=True)
        except (OSError, StopIteration, IndexError) as error:
            raise ImageError(f"{self.name} cannot be read: {one_line(error)}") from None
        except (binascii.Error, ValueError):
            raise ImageError(f"{self.name} is no base64: write the picture's bytes in base64, or its path") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A picture as a value of a Parquet file: bytes, or a struct with `bytes` and `path`, as datasets have them."""

    name: str
    file: str
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        """As `File.read`. The row group is read whole, and kept for its other pictures."""
        try:
            with _groups_lock:
                value = _row_group(self.file, self.group, self.column)[self.row].as_py()
        except Exception as error:  # a damaged file can fail anywhere in Arrow
            raise ImageError(f"{self.name} cannot be read: {one_line(error)}") from None
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            if value is None and path:
                return _from_file(Path(self.file).parent / path)
        if not value:
            raise ImageError(f"{self.name} holds nothing: give it a picture")
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A place of a table that names no picture."""

    name: str

    def read(self) -> bytes:
        """ImageError."""
        raise ImageError(f"{self.name} names no picture: fill in the cell")


Source = File | Member | Cell | Value | Missing

_groups_lock = threading.Lock()  # neighbours ask for the same row group, which is to be read once


@functools.lru_cache(maxsize=1)
def _row_group(file: str, group: int, column: str) -> Any:
    return parquet().ParquetFile(file).read_row_group(group, columns=[column]).column(0)


def parquet() -> ModuleType:
    """pyarrow.parquet; ConfigError when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError('Parquet files need pyarrow: pip install -e ".[annotate]"') from None
    return pyarrow.parquet


def csv_records(file: BinaryIO, name: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV or, by its name, TSV file from where it is, each with the byte at which it begins.

    Raises:
      ValueError: it is no UTF-8.
      csv.Error: it is no CSV.
    """
    position = file.tell()

    def lines() -> Iterable[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode().removeprefix(_BOM)

    csv.field_size_limit(min(2 * MAX_BYTES, sys.maxsize))  # pictures in base64 are longer than any text
    start = position
    for record in csv.reader(lines(), delimiter="\t" if name.lower().endswith(".tsv") else ","):
        yield start, record
        start = position


def _from_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Some bytes of a file, all by default."""
    with opened(expanded(path)) as file:
        file.seek(offset)
        data = file.read(min(size, MAX_BYTES + 1) if size >= 0 else MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{path} has more than {MAX_BYTES // 2**20} MiB: make it smaller")
    return data
