"""Images that were embedded, kept for the next request about them."""

import hashlib
from collections import OrderedDict

import jax
import numpy as np


def digest(pixels: np.ndarray) -> bytes:
    """What tells images apart: a hash of what the network sees of them."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).digest()


class SoftTokenCache:
    """Soft tokens [N, D] by image, those that were used last; of one thread.

    Args:
      most_bytes: that they take together.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, jax.Array] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> jax.Array | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, soft_tokens: jax.Array) -> None:
        if key in self._kept or soft_tokens.nbytes > self._most_bytes:
            return
        self._kept[key] = soft_tokens
        self.num_bytes += soft_tokens.nbytes
        while self.num_bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def clear(self) -> None:
        self._kept.clear()
        self.num_bytes = 0
