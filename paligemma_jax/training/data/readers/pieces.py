"""Pieces of a file that are read when they are asked for."""

import threading
import weakref
from pathlib import Path

from paligemma_jax.errors import DataError


class Pieces:
    """A file that is kept open, for any thread.

    It is not mapped: a file that another program cuts short is an error then, and not the end of the process.
    """

    def __init__(self, path: Path):
        """OSError when it cannot be opened."""
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; DataError when they are not there any more."""
        with self._lock:
            self._file.seek(start)
            piece = self._file.read(size)
        if len(piece) != size:
            raise DataError(f"{self._path} has become shorter since it was opened: start again with the new one")
        return piece
