"""What a user names, to the pictures of a run in a fixed order.

A folder, a glob, a picture or a URL; a text file with a path on each line (.txt); a table (.csv, .tsv, .parquet) with a
column of paths or of bytes; a WebDataset tar. Several tables or tars are named by a glob or by shard-{000..099}.tar.
"""

import csv
import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from paligemma_jax.annotate.sources import Cell, File, Member, Missing, Source, Value, csv_records, parquet
from paligemma_jax.errors import DataError, one_line
from paligemma_jax.files import read_lines
from paligemma_jax.processing import fetch
from paligemma_jax.processing.find import find_images, natural_key, suffixes

COLUMNS = (  # that are looked for, in this order
    *("image", "path", "image_path", "file", "file_name", "filename", "filepath", "file_path", "url", "image_url"),
    *("bytes", "image_bytes", "image_base64", "base64"),
)
_ENCODED = ("bytes", "base64")  # how the names of CSV columns end that hold pictures in base64
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find(
    pattern: str, column: str = "", root: str = "", tell: Callable[[str], None] = lambda line: None
) -> list[Source]:
    """The pictures that are named, each once; none of them is opened.

    Args:
      pattern: see above.
      column: of a table, by default the first of `COLUMNS` that it has; of a tar the ending of its pictures, as in
        "jpg", by default all that are pictures'.
      root: folder that relative paths in a list or a table start from, by default that of the file.
      tell: called with a line about what was passed over.

    Raises:
      ImageError, DataError: nothing is there, or it cannot be read.
      ConfigError: there are Parquet files, and pyarrow is not installed.
    """
    path = os.path.expanduser(pattern)
    if path.lower().endswith(_COMPRESSED):
        raise DataError(f"{pattern} is compressed: unpack it, or each picture would be found by reading all before it")
    reader = _READERS.get(Path(path).suffix.lower())
    if reader is None or fetch.is_url(path):
        return [File(fetch.label(name), name) for name in find_images(path, tell=tell)]
    found: list[Source] = []
    for file in _files(path):
        sources = list(_checked(reader, file, column, os.path.expanduser(root) or os.path.dirname(file)))
        if not sources:
            raise DataError(f"{file} holds no pictures: give a file that does")
        found += sources
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        tell(f"note: {pattern}: passed over {len(found) - len(unique)} that are named twice")
    return unique


def folder_of(pattern: str, root: str = "") -> str:
    """The folder that relative names of the pictures of `find` start from, "" for this process's own."""
    is_table = Path(pattern).suffix.lower() in _READERS
    return os.path.expanduser(root) or os.path.dirname(os.path.expanduser(pattern)) if is_table else ""


def _files(pattern: str) -> list[str]:
    """The files of a pattern in natural order; DataError when there are none."""
    found = []
    for name in _expanded(pattern):
        is_glob = glob.has_magic(name) and not os.path.exists(name)
        matches = sorted(glob.glob(name, recursive=True), key=natural_key) if is_glob else [name]
        if not matches or not all(map(os.path.isfile, matches)):
            raise DataError(f"{name} is not there: give a file or, in quotes, a glob")
        found += matches
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """shard-{000..002}.tar as the three names that it stands for."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(last) < int(first):
        raise DataError(f"{match[0]} in {pattern} counts down: write the smaller number first")
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _checked(reader: Callable[..., Iterator[Source]], file: str, column: str, folder: str) -> Iterator[Source]:
    """What a reader finds, its errors in our words."""
    try:
        yield from reader(file, column, folder)
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text: save it as UTF-8") from None
    except (OSError, ValueError, csv.Error, tarfile.TarError) as error:  # ValueError: Arrow's
        raise DataError(f"{file} cannot be read: {one_line(error)}") from None


def _from_list(file: str, column: str, folder: str) -> Iterator[Source]:
    for number, line in enumerate(read_lines(Path(file)), 1):
        if name := line.strip():
            yield _named(name, f"{file}#{number}", folder)


def _from_csv(file: str, column: str, folder: str) -> Iterator[Source]:
    with open(file, "rb") as stream:
        records = csv_records(stream, file)
        _, header = next(records, (0, []))
        name = _chosen(column, header, file)
        place, encoded = header.index(name), name.lower().endswith(_ENCODED)
        number = 0
        for offset, record in records:
            if not record:
                continue  # an empty line
            number += 1
            value = record[place].strip() if len(record) > place else ""
            where = f"{file}#{number}"
            if encoded and value:
                yield Cell(where, file, offset, place)
            else:
                yield _named(value, where, folder)


def _from_parquet(file: str, column: str, folder: str) -> Iterator[Source]:
    arrow = parquet()
    try:
        table = arrow.ParquetFile(file)
    except ValueError as error:  # Arrow's errors are of this kind
        raise DataError(f"{file} is no Parquet file: {one_line(error)}") from None
    with table:
        name = _chosen(column, table.schema_arrow.names, file)
        kind = str(table.schema_arrow.field(name).type)
        if kind.startswith(("string", "large_string")):
            number = 0
            for batch in table.iter_batches(columns=[name]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _named((value or "").strip(), f"{file}#{number}", folder)
            return
        if not (kind.startswith(("binary", "large_binary", "fixed_size_binary")) or "bytes: " in kind):
            raise DataError(f"column {name!r} of {file} is {kind:.60}: name one of paths or bytes with image_column")
        number = 0
        for group in range(table.num_row_groups):
            for row in range(table.metadata.row_group(group).num_rows):
                number += 1
                yield Value(f"{file}#{number}", file, group, row, name)


def _from_tar(file: str, column: str, folder: str) -> Iterator[Source]:
    wanted = column.lower().lstrip(".")
    with tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # or it would keep them all
            base = os.path.basename(member.name)
            ending = base.lower().partition(".")[2]  # what WebDataset takes for one: all behind the first dot
            is_picture = ending == wanted if wanted else Path(base).suffix.lower() in suffixes()
            if member.isfile() and is_picture and not base.startswith("."):
                yield Member(f"{file}/{member.name}", file, member.offset_data, member.size)


_READERS = {
    ".txt": _from_list,
    ".lst": _from_list,
    ".csv": _from_csv,
    ".tsv": _from_csv,
    ".parquet": _from_parquet,
    ".tar": _from_tar,
}


def _named(value: str, where: str, folder: str) -> Source:
    """The picture that a line or a cell names; `where` it does so is the name of what has none."""
    if not value:
        return Missing(where)
    if fetch.is_url(value):
        return File(where if value.lower().startswith("data:") else value, value)
    path = os.path.join(folder, os.path.expanduser(value))
    return File(value, value if path == value else path)


def _chosen(column: str, names: Sequence[str], file: str) -> str:
    """The column to take; DataError when there is none of that name."""
    if column in names:
        return column
    listed = ", ".join(names[:12]) or "none"
    if column:
        raise DataError(f"{file} has no column {column!r}: it has {listed}")
    lower = {name.lower().strip(): name for name in reversed(names)}
    if (found := next((lower[name] for name in COLUMNS if name in lower), None)) is None:
        raise DataError(f"{file} has no column of a known name, only {listed}: name one with image_column")
    return found
