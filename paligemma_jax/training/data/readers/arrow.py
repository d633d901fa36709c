"""Folders of `datasets.Dataset.save_to_disk`, with the columns image, prefix and suffix, read by pyarrow alone.

An image is what the Image feature stores (bytes, or a path), a path, or a list of those. The files are mapped.
"""

from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import CheckpointError, DataError, one_line
from paligemma_jax.files import read_json
from paligemma_jax.training.data.examples import Example, Examples, Picture, check_on_disk, make_example, sizes_of
from paligemma_jax.training.data.found import Found, ReadSettings

STATE = "state.json"  # in the folder of a data set
SPLITS = "dataset_dict.json"  # in the folder of several
_COLUMNS = ("image", "prefix", "suffix")
_ROWS = 4096  # whose texts are in memory while they are checked


class ArrowRows(Examples):
    """The examples of some Arrow files; the texts of every row are checked when they are opened.

    Raises:
      DataError: a file or a column is missing, or a row is not what it should be; it is named.
    """

    def __init__(self, folder: Path, paths: list[Path], indices: list[Path], root: Path, settings: ReadSettings):
        self._folder, self._root = folder, root
        self._table = _table(paths)
        self._rows = _table(indices).column(0).to_numpy() if indices else None
        if missing := [name for name in _COLUMNS if name not in self._table.column_names]:
            names = ", ".join(self._table.column_names)
            raise DataError(
                f"{folder} has no column {missing[0]!r}, only {names}: rename columns to {', '.join(_COLUMNS)}"
            )
        if not len(self):
            raise DataError(f"{folder} is empty: give a data set with rows")
        good, bounds = [], []
        for start in range(0, len(self), _ROWS):
            places = range(start, min(start + _ROWS, len(self)))
            rows = np.asarray(places if self._rows is None else self._rows[start : places.stop], np.int64)
            part = self._table.select(_COLUMNS[1:]).take(rows).to_pylist()
            for place, row in zip(places, part, strict=True):
                with settings.row():
                    example = self._example(place, self._images(place, stored=False), row)
                    check_on_disk(example)
                    good.append(place)
                    bounds.append(sizes_of(example))
        if len(good) < len(self):
            self._rows = np.array(good, np.int64) if self._rows is None else self._rows[good]
        self._bounds = np.array(bounds, np.int32).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._table) if self._rows is None else len(self._rows)

    def at(self, index: int) -> Example:
        row = {name: self._cell(name, index).as_py() for name in _COLUMNS[1:]}
        return self._example(index, self._images(index), row)

    def bounds(self) -> np.ndarray:
        return self._bounds

    def _cell(self, name: str, index: int) -> Any:
        return self._table.column(name)[index if self._rows is None else int(self._rows[index])]

    def _example(self, index: int, images: tuple[Picture, ...], row: dict[str, Any]) -> Example:
        where = self._where(index)
        if not all(isinstance(row[name], str) for name in _COLUMNS[1:]):
            raise DataError(f"{where} has a prefix or suffix that is no text: give texts")
        return make_example(images, row["prefix"], row["suffix"], where)

    def _where(self, index: int) -> str:
        return f"{self._folder} row {index}"

    def _images(self, index: int, stored: bool = True) -> tuple[Picture, ...]:
        """The pictures of a row; unless `stored`, those inside the files stay there."""
        cell = self._cell("image", index)
        cells = list(cell) if hasattr(cell, "values") and not hasattr(cell, "keys") else [cell]
        return tuple(self._picture(one, index, stored) for one in cells)

    def _picture(self, cell: Any, index: int, stored: bool) -> Picture:
        fields = dict(cell.items()) if hasattr(cell, "items") and cell.is_valid else {}
        content, path = fields.get("bytes"), fields.get("path", cell)
        if content is not None and content.is_valid:
            return content.as_py() if stored else b""
        name = path.as_py()
        if not isinstance(name, str):
            raise DataError(f"{self._where(index)} has no picture: image is bytes, a path, or a list of those")
        return str(self._root / name)


def read(found: Found, settings: ReadSettings) -> Examples:
    folder = found.root
    parts = _listed(folder, "_data_files"), _listed(folder, "_indices_data_files")
    return ArrowRows(folder, *parts, settings.image_root or folder, settings)


def files(found: Found) -> list[Path]:
    """What examples depend on."""
    return [*_listed(found.root, "_data_files"), *_listed(found.root, "_indices_data_files")]


def _listed(folder: Path, key: str) -> list[Path]:
    try:
        return [folder / entry["filename"] for entry in read_json(folder / STATE).get(key) or ()]
    except (CheckpointError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no folder of datasets.save_to_disk ({one_line(error)}): save it again") from None


def _table(paths: list[Path]) -> Any:
    """One table over mapped files."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError('data of datasets.save_to_disk need pyarrow: pip install -e ".[train]"') from None
    tables = []
    for path in paths:
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} cannot be read ({one_line(error)}): save the data set again") from None
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        names = " and ".join(path.name for path in paths[:2])
        raise DataError(f"{names} do not fit together ({one_line(error)}): save the data set again") from None
