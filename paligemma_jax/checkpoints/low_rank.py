"""A weight and its low-rank change as one array, in numpy: W + scale * B A in float32, rounded once.

What an adapter is merged by while it is read, and after it was trained: the bits are the same.

Axes: F outputs, D inputs (of an embedding F rows and D width), r rank.
Source: peft 0.21, tuners/lora/{layer,dora}.py
"""

from collections.abc import Iterator

import numpy as np

from paligemma_jax.checkpoints.arrays import cast_into, empty_aligned

_CHUNK_ELEMENTS = 1 << 22


def merge(
    weight: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    scale: float,
    magnitude: np.ndarray | None = None,
    by_column: bool = False,
    dtype: np.dtype | None = None,
    name: str = "a weight",
) -> np.ndarray:
    """The merged weight.

    Args:
      weight: [F, D], or a convolution's kernel, whose axes behind the first are one here.
      left: [F, r].
      right: [r, D].
      magnitude: DoRA's norms of the rows, `by_column` of the columns.
      dtype: of the result; None takes the weight's.
      name: of the weight, for errors.

    Raises:
      CheckpointError: float16 cannot hold a value.
    """
    out = empty_aligned(weight.shape, dtype or weight.dtype)
    flat = out.reshape(len(out), -1)
    for rows, values in _merged(weight.reshape(flat.shape), left, right, scale, magnitude, by_column):
        cast_into(flat[rows], values, name)
    return out


def _merged(
    weight: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float, magnitude: np.ndarray | None, by_column: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of the merged weight [F, D] at a time, float32."""
    left, right = _float32(left).reshape(len(weight), -1), _float32(right).reshape(-1, weight.shape[1])

    def pieces() -> Iterator[tuple[slice, np.ndarray]]:
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
            yield rows, _float32(weight[rows]) + (left[rows] @ right) * np.float32(scale)

    if magnitude is None:
        yield from pieces()
        return
    magnitude = _float32(magnitude).reshape(-1)
    if by_column:
        norms = np.sqrt(sum(np.square(piece, dtype=np.float64).sum(axis=0) for _, piece in pieces()))
        factors = (magnitude / norms).astype(np.float32)[None]
        yield from ((rows, piece * factors) for rows, piece in pieces())
    else:
        for rows, piece in pieces():
            norms = np.maximum(np.linalg.norm(piece, axis=1), np.finfo(np.float32).tiny)  # an empty row stays empty
            yield rows, piece * (magnitude[rows] / norms)[:, None]


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)
