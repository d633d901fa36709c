"""Tensors in safetensors files, read and written by the package of that name.

The package copies what it reads. A large tensor that needs no cast and is aligned is mapped instead (`mapping`); files
written here have their large tensors aligned. Source: https://huggingface.co/docs/safetensors
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from paligemma_jax.checkpoints import mapping
from paligemma_jax.checkpoints.arrays import ALIGNMENT, cast_into, empty_aligned
from paligemma_jax.errors import CheckpointError, one_line
from paligemma_jax.files import replacing

# The format's codes of the dtypes that weights have, in the order in which the package lays tensors out in a file.
STORED = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
FLOATS = ("F32", "F16", "BF16")
_CODES = {dtype: code for code, dtype in STORED.items()}
_LARGE = 1 << 20  # bytes from which on a tensor is mapped or read in pieces
_PIECE_ELEMENTS = 1 << 20
_WINDOW_ELEMENTS = 1 << 26  # that are read from one mapping of the package
_NOTE = {"format": "pt"}  # transformers insists on it


class Tensor(NamedTuple):
    """Where one tensor lies; `dtype` is the format's code ("BF16")."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    handle: safe_open  # reads from the file as it was when its header was read

    @property
    def stored(self) -> np.dtype:
        """The dtype of its elements; KeyError where it is none that weights have."""
        return STORED[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _bits(self.dtype) // 8


def _bits(code: str) -> int:
    """Bits of an element: those of "F32", "BF16" and "F8_E4M3" are 32, 16 and 8."""
    return 8 if code == "BOOL" else int(re.search(r"\d+", code).group())


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> place of every tensor of a file.

    Raises:
      CheckpointError: the header is damaged, or does not promise exactly the bytes that the file has.
    """
    with path.open("rb") as file:
        if file.read(8) == b"version ":
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` or download it again"
            )
    try:
        handle = safe_open(path, "np", backend="pread")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated, or has a corrupt header ({one_line(error)}): download it again"
        ) from None
    found, end = {}, 0
    for name in handle.offset_keys():
        entry = handle.get_slice(name)
        found[name] = Tensor(path, name, entry.get_dtype(), tuple(entry.get_shape()), end, handle)
        end += found[name].nbytes
    start = path.stat().st_size - end  # the tensors fill the file up to its end, as the package has checked
    return {name: tensor._replace(offset=start + tensor.offset) for name, tensor in found.items()}


def read_note(path: Path) -> dict[str, str]:
    """The texts in a file that `read_header` can read."""
    return safe_open(path, "np", backend="pread").metadata() or {}


def read(tensor: Tensor, dtype: np.dtype | None = None, advance: Callable[[int], None] | None = None) -> np.ndarray:
    """One tensor as an array, cast piece by piece to `dtype` (None: as stored); `advance` is told of bytes read.

    A large one that needs no cast and is aligned stays in the pages of its file and is read-only: nobody may write into
    that file while the array lives. To put another file in its place, as everything here does, is safe.

    Raises:
      CheckpointError: the file has become shorter, or float16 cannot hold a value.
    """
    as_stored = dtype is None or dtype == tensor.stored
    with _naming(tensor):
        if as_stored and tensor.nbytes >= _LARGE and tensor.offset % ALIGNMENT == 0 and mapping.SUPPORTED:
            with contextlib.suppress(OSError):  # a file system that cannot do it
                return _mapped(tensor, advance)
        out = empty_aligned(tensor.shape, dtype or tensor.stored)
        for index, piece in _pieces(tensor, tensor.nbytes >= _LARGE):
            cast_into(out[index], piece, tensor.name)
            if advance:
                advance(piece.nbytes)
        return out


@contextlib.contextmanager
def _naming(tensor: Tensor) -> Iterator[None]:
    """Errors of reading as one that names the tensor."""
    try:
        yield
    except (EOFError, SafetensorError):
        raise CheckpointError(f"{tensor.file} has changed, or ended while {tensor.name} was read") from None


def _mapped(tensor: Tensor, advance: Callable[[int], None] | None) -> np.ndarray:
    array = mapping.map_array(tensor.file, tensor.offset, tensor.shape, tensor.stored)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE_ELEMENTS):
        piece = flat[start : start + _PIECE_ELEMENTS]
        mapping.read_pages(piece)
        if advance:
            advance(piece.nbytes)
    return array


def _pieces(tensor: Tensor, by_rows: bool) -> Iterator[tuple[Any, np.ndarray]]:
    """The tensor as pairs (index, its elements there): whole, or some rows at a time."""
    if not by_rows:
        yield ..., tensor.handle.get_tensor(tensor.name)
        return
    num_rows, row_elements = tensor.shape[0], max(1, math.prod(tensor.shape[1:]))
    step, window = max(1, _PIECE_ELEMENTS // row_elements), max(1, _WINDOW_ELEMENTS // row_elements)
    for first in range(0, num_rows, window):
        handle = tensor.handle
        with contextlib.suppress(OSError):  # a file system that cannot map: each slice costs as much as the tensor
            handle = safe_open(tensor.file, "np")  # its pages count as memory until it is closed
        entry, end = handle.get_slice(tensor.name), min(first + window, num_rows)
        for start in range(first, end, step):
            rows = slice(start, min(start + step, end))
            yield rows, entry[rows]


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of equal shape hold equal numbers, compared in float32 a piece at a time."""
    by_rows = max(first.nbytes, second.nbytes) >= _LARGE
    with _naming(first), _naming(second):
        pairs = zip(_pieces(first, by_rows), _pieces(second, by_rows), strict=True)
        return all(np.array_equal(a.astype(np.float32), b.astype(np.float32)) for (_, a), (_, b) in pairs)


def write(
    path: Path,
    tensors: Mapping[str, Any],
    dtype: np.dtype | None = None,
    uncast: Collection[str] = (),
    note: Mapping[str, str] | None = None,
) -> None:
    """Write arrays (numpy or JAX) under their names, whole or not at all, with one or two texts that `read_note` gives.

    All are cast to `dtype` if given, those named in `uncast` excepted. The package takes all arrays of a file at once:
    arrays that are in host memory and need no cast are not copied, the others take memory until the file is written.

    Raises:
      CheckpointError: a dtype that no weight has, a value that float16 cannot hold, or a file that cannot be written.
    """
    targets = {name: np.dtype(dtype if dtype and name not in uncast else x.dtype) for name, x in tensors.items()}
    if odd := [f"{name} is {target.name}" for name, target in targets.items() if target not in _CODES]:
        raise CheckpointError(f"only bfloat16, float16, float32, int8 and uint8 are written: {', '.join(odd)}")
    arrays = {name: _host_array(array, targets[name], name) for name, array in tensors.items()}
    specs = {
        name: TensorSpec(dtype=x.dtype.name, shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
        for name, x in arrays.items()
    }
    note = _NOTE | dict(note or {})
    note |= {"padding": " " * _padding(arrays, note)}
    try:
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask allows; the package allows nobody else to read
            serialize_file(specs, temporary, note)
            temporary.chmod(mode)
            _order_note(temporary, note)
    except SafetensorError as error:
        raise CheckpointError(f"{path} could not be written: {one_line(error)}") from None


def _host_array(array: Any, dtype: np.dtype, name: str) -> np.ndarray:
    """A contiguous array in host memory, cast in pieces; itself if it is that already."""
    source = np.asarray(array, order="C")
    if source.dtype == dtype:
        return source
    out = np.empty(source.shape, dtype)
    flat, flat_source = out.reshape(-1), source.reshape(-1)
    for start in range(0, flat.size, _PIECE_ELEMENTS):
        piece = slice(start, start + _PIECE_ELEMENTS)
        cast_into(flat[piece], flat_source[piece], name)
    return out


def _padding(arrays: Mapping[str, np.ndarray], note: Mapping[str, str]) -> int:
    """How many spaces in the header align most bytes of large tensors (those that are mapped).

    All tensors cannot be aligned: they lie one behind the other, and a bias may have any size.
    """
    order = list(STORED)
    names = sorted(arrays, key=lambda name: (order.index(_CODES[arrays[name].dtype]), name))
    header: dict[str, Any] = {"__metadata__": {**note, "padding": ""}}
    aligned, end = [0] * ALIGNMENT, 0  # padding -> bytes of large tensors that it aligns
    for name in names:
        array = arrays[name]
        if array.nbytes >= _LARGE:
            aligned[-end % ALIGNMENT] += array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    start = 8 + len(json.dumps(header, separators=(",", ":")))
    best = max(range(0, ALIGNMENT, 8), key=lambda shift: aligned[shift])
    return (best - start) % ALIGNMENT


def _order_note(path: Path, note: Mapping[str, str]) -> None:
    """Put the entries of the metadata in order: the package's is random, and equal weights give equal files."""
    ours, *others = (
        json.dumps(dict(entries), separators=(",", ":")).encode() for entries in permutations(note.items())
    )
    with path.open("r+b") as file:
        head = file.read(8 + len('{"__metadata__":') + len(ours))
        file.seek(0)
        file.write(next((head.replace(other, ours) for other in others if other in head), head))
