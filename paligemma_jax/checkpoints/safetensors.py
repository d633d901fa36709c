"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes.

Read and written here without the package of that name, for two reasons: a file is verified from its header alone,
and numbers go straight between the file and their final, JAX-aligned place: cast on the way in small pieces, or left in
the file's own pages where it is aligned, as all large tensors are in files written here.
Format: https://huggingface.co/docs/safetensors
"""

import contextlib
import json
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.files import replacing

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_STORED = DTYPES | {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}  # whole numbers of quantized weights
_CODES = {dtype: code for code, dtype in _STORED.items()}
_CODE_BITS = {"BOOL": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F64": 64}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_ELEMENTS = 4 << 20
_ALIGNMENT = 64  # JAX on CPU adopts memory so aligned instead of copying it
_MAPPED_BYTES = 1 << 20  # from so many on, a tensor has pages of its own
_PAGE = 4096  # bytes of the smallest page there is
_PAGES = weakref.WeakValueDictionary()  # the pages of each file in use: a mapping holds a file descriptor


class Tensor(NamedTuple):
    """Where one tensor lies; `dtype` is the format's code ("BF16")."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def stored(self) -> np.dtype:
        """The dtype of its numbers in the file; KeyError where it is none that weights have."""
        return _STORED[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of "bfloat16", "float16" or "float32"; ConfigError for anything else."""
    for dtype in DTYPES.values():
        if dtype.name == name:
            return dtype
    raise ConfigError(f"dtype {name!r} is unknown: use one of {', '.join(sorted(d.name for d in DTYPES.values()))}")


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> place of every tensor, after checking the header and that the file has exactly the bytes it promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` or download it again"
            )
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(f"{path} is no safetensors file, or is truncated within its header ({size} bytes)")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"{path} has a corrupt header ({type(error).__name__}: {error})"
        raise CheckpointError(message.replace("\n", " ")) from None
    end = 8 + length
    for tensor, stop in sorted(tensors.values(), key=lambda pair: pair[0].offset):
        if tensor.offset != end:
            raise CheckpointError(f"{path} has a corrupt header: {tensor.name} starts at {tensor.offset}, not at {end}")
        end = stop
    if end != size:
        reason = "it is truncated, download it again" if size < end else "the bytes after its end are not explained"
        raise CheckpointError(f"{path} has {size} bytes but its header promises {end}: {reason}")
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> tuple[Tensor, int]:
    """One header entry -> the tensor and the offset of its end; raises ValueError and the like on nonsense."""
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or offset that is not a natural number")
    bits = _STORED[code].itemsize * 8 if code in _STORED else _CODE_BITS.get(code)
    if bits is not None and end - begin != math.prod(shape) * bits // 8:
        raise ValueError(f"{name} has {end - begin} bytes, which is not {code} {list(shape)}")
    return Tensor(path, name, code, shape, start + begin), start + end


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like np.empty, in memory that JAX on CPU adopts without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def read(tensor: Tensor, dtype: np.dtype | None = None, advance: Callable[[int], None] | None = None) -> np.ndarray:
    """Read one tensor once, cast piece by piece to `dtype` (None: as stored); `advance` is told of bytes read.

    A large one that needs no cast and is aligned stays in the pages of its file: nobody may write into that file while
    the array lives. To put another file in its place, as everything here does, is safe.
    """
    source = tensor.stored
    as_stored = dtype is None or dtype == source
    aligned = tensor.offset % _ALIGNMENT == 0 and sys.platform != "win32"  # there, a file in use cannot be replaced
    if as_stored and aligned and tensor.nbytes >= _MAPPED_BYTES:
        with contextlib.suppress(OSError):  # a file system that cannot do it, or no room for addresses
            return _mapped(tensor, advance)
    out = empty_aligned(tensor.shape, dtype or source)
    flat = out.reshape(-1)
    scratch = None if flat.dtype == source else np.empty(min(flat.size, _PIECE_ELEMENTS), source)
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, flat.size, _PIECE_ELEMENTS):
            target = flat[start : start + _PIECE_ELEMENTS]
            piece = target if scratch is None else scratch[: target.size]
            try:
                fill(piece, file)
            except EOFError:
                raise _ended(tensor) from None
            if scratch is not None:
                cast_into(target, piece, tensor.name)
            if advance:
                advance(piece.nbytes)
    return out


def _mapped(tensor: Tensor, advance: Callable[[int], None] | None) -> np.ndarray:
    """The tensor in pages of its file, to read only."""
    with tensor.file.open("rb") as file:
        status = os.fstat(file.fileno())
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        pages = _PAGES.get(key)
        if pages is None:
            pages = _PAGES.setdefault(key, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if tensor.offset + tensor.nbytes > len(pages):
        raise _ended(tensor)
    numbers = np.frombuffer(pages, np.uint8, tensor.nbytes, tensor.offset)
    numbers.flags.writeable = False  # what is written would be lost as soon as another reader of it is gone
    weakref.finalize(numbers, _give_back, pages, tensor).atexit = False
    step = _PIECE_ELEMENTS * tensor.stored.itemsize
    for start in range(0, numbers.size, step):
        piece = numbers[start : start + step]
        piece[::_PAGE].max()  # looking at each page has it read now, and not by the first product
        if advance:
            advance(piece.nbytes)
    return numbers.view(tensor.stored).reshape(tensor.shape)


def _give_back(pages: mmap.mmap, tensor: Tensor) -> None:
    """Let go of the memory that holds nothing but a tensor; it would be read again if somebody still looked at it."""
    start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.offset + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError):  # memory that is locked
            pages.madvise(mmap.MADV_DONTNEED, start, length)


def _ended(tensor: Tensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file} ended while {tensor.name} was read")


def fill(array: np.ndarray, stream: IO[bytes]) -> None:
    """Read a contiguous array's bytes from a stream; EOFError when there are too few."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        count = stream.readinto(view)
        if not count:
            raise EOFError("too few bytes")
        view = view[count:]


def cast_into(target: np.ndarray, source: np.ndarray, name: str) -> None:
    """Cast `source` into `target`; CheckpointError when float16 cannot hold a value."""
    with np.errstate(over="ignore", invalid="ignore"):
        target[...] = source
    if target.dtype == np.float16 and not np.array_equal(np.isfinite(target), np.isfinite(source)):
        raise CheckpointError(f"{name} holds values beyond the range of float16: use bfloat16")


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of equal shape hold equal numbers, compared in float32 a piece at a time."""
    a, b = (np.memmap(t.file, DTYPES[t.dtype], "r", t.offset, (math.prod(t.shape),)) for t in (first, second))
    pieces = (slice(start, start + _PIECE_ELEMENTS) for start in range(0, a.size, _PIECE_ELEMENTS))
    return all(np.array_equal(a[p].astype(np.float32), b[p].astype(np.float32)) for p in pieces)


def write(path: Path, tensors: Mapping[str, Any], dtype: np.dtype | None = None, uncast: Collection[str] = ()) -> None:
    """Write arrays (numpy or JAX) under their names, one at a time, whole or not at all.

    All are cast to `dtype` if given, those named in `uncast` excepted. Every tensor is aligned, but for some of those
    whose size would displace the next one, which come last.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on this note
    targets = {name: np.dtype(dtype if dtype and name not in uncast else x.dtype) for name, x in tensors.items()}
    names = sorted(tensors, key=lambda name: math.prod(tensors[name].shape) * targets[name].itemsize % _ALIGNMENT > 0)
    end = 0
    for name in names:
        array, target = tensors[name], targets[name]
        if target not in _CODES:
            raise CheckpointError(
                f"{name} is {target.name}: only bfloat16, float16, float32, int8 and uint8 are written"
            )
        start, end = end, end + math.prod(array.shape) * target.itemsize
        header[name] = {"dtype": _CODES[target], "shape": list(array.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            flat = np.ascontiguousarray(tensors[name]).reshape(-1)
            for start in range(0, flat.size, _PIECE_ELEMENTS):
                piece = flat[start : start + _PIECE_ELEMENTS]
                if dtype and piece.dtype != dtype and name not in uncast:
                    source, piece = piece, np.empty(piece.shape, dtype)
                    cast_into(piece, source, name)
                file.write(piece.view(np.uint8))
