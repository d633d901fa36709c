"""Arrays in host memory on their way between a file and a device: dtypes, alignment, checked casts."""

import math

import ml_dtypes
import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError

DTYPES = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))  # of parameters
ALIGNMENT = 64  # bytes: JAX on CPU adopts memory so aligned instead of copying it


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of "bfloat16", "float16" or "float32"; ConfigError for anything else."""
    for dtype in DTYPES:
        if dtype.name == name:
            return dtype
    raise ConfigError(f"dtype {name!r} is unknown: use one of {', '.join(sorted(d.name for d in DTYPES))}")


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like np.empty, in memory that JAX on CPU adopts without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def cast_into(target: np.ndarray, source: np.ndarray, name: str) -> None:
    """Cast `source` into `target`; CheckpointError when it cannot hold a value that float16 or float64 may ask for."""
    with np.errstate(over="ignore", invalid="ignore"):
        target[...] = source
    narrows = target.dtype == np.float16 or source.dtype == np.float64  # the others have nearly the same range
    if narrows and not np.array_equal(np.isfinite(target), np.isfinite(source)):
        remedy = "use bfloat16" if target.dtype == np.float16 else "are they damaged?"
        raise CheckpointError(f"{name} holds values beyond the range of {target.dtype.name}: {remedy}")


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """An array as another dtype, itself if it has that; CheckpointError as of `cast_into`."""
    if array.dtype == dtype:
        return array
    out = empty_aligned(array.shape, dtype)
    cast_into(out, array, name)
    return out
