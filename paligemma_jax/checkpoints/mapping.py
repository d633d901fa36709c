"""Arrays that stay in the pages of their file: what the safetensors package, which copies, does not offer.

A mapping is private and its arrays are read-only. All arrays of a file share one mapping, since each mapping holds a
file descriptor; the memory of an array that nobody holds any more is given back.
"""

import contextlib
import math
import mmap
import os
import sys
import weakref
from pathlib import Path

import numpy as np

SUPPORTED = sys.platform != "win32"  # there, a file in use cannot be replaced
_PAGE = 4096  # bytes of the smallest page there is
_MAPPINGS: weakref.WeakValueDictionary[tuple[int, ...], mmap.mmap] = weakref.WeakValueDictionary()


def map_array(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array that begins `offset` bytes into a file, read-only and without a copy.

    Nobody may write into the file while the array lives. To put another file in its place is safe.

    Raises:
      EOFError: the file is too short.
      OSError: the file system cannot map files, or there is no room for addresses.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        pages = _MAPPINGS.get(key)
        if pages is None:
            pages = _MAPPINGS.setdefault(key, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    nbytes = math.prod(shape) * dtype.itemsize
    if offset + nbytes > len(pages):
        raise EOFError(f"{path} has {len(pages)} bytes, not {offset + nbytes}")
    raw = np.frombuffer(pages, np.uint8, nbytes, offset)
    raw.flags.writeable = False  # a write would be lost as soon as another array of these pages is gone
    weakref.finalize(raw, _give_back, pages, offset, nbytes).atexit = False
    return raw.view(dtype).reshape(shape)


def read_pages(array: np.ndarray) -> None:
    """Have the pages of a mapped array read now, and not by the first program that uses them."""
    array.reshape(-1).view(np.uint8)[::_PAGE].max()


def _give_back(pages: mmap.mmap, offset: int, nbytes: int) -> None:
    """Let go of whole pages; they would be read from the file again if somebody still looked at them."""
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError):  # memory that is locked
            pages.madvise(mmap.MADV_DONTNEED, start, length)
