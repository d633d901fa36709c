"""Image embeddings as files, and edits of them: swap patches, interpolate, quantize.

Embeddings are soft tokens, after the projector, or the encoder's features before it. Axes: I images, N patches in
row-major order over a G x G grid, D width.
"""

from pathlib import Path

import numpy as np

from paligemma_jax.errors import DataError, ImageError
from paligemma_jax.files import write_array
from paligemma_jax.tasks.detection import Box

BITS = (16, 8, 4, 2)


def save(path: str | Path, embeddings: np.ndarray) -> None:
    """Write embeddings [I, N, D] as a plain .npy of float32."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, np.asarray(embeddings, np.float32))


def load(path: str | Path) -> np.ndarray:
    """Read embeddings float32 [I, N, D]; a file of one image's [N, D] will do.

    Raises:
      DataError: the file is missing or holds something else; pickles are not opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: save_embeddings=FILE writes such a file") from None
    except Exception:  # a damaged header is evaluated as Python: many kinds of errors come of it
        raise DataError(f"{path} is damaged, or no plain .npy file of one array: save it again") from None
    if values.ndim not in (2, 3) or not values.size or not np.issubdtype(values.dtype, np.floating):
        raise DataError(
            f"{path} holds {values.dtype} of shape {values.shape}: embeddings are floats of shape "
            "(pictures, patches, width), or (patches, width) of one picture"
        )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds values that are not finite: save it again")
    return values if values.ndim == 3 else values[None]


def check_same_shape(first: np.ndarray, second: np.ndarray) -> None:
    """ImageError, which names both shapes, unless they are the same."""
    if np.shape(first) != np.shape(second):
        raise ImageError(
            f"embeddings of shape {np.shape(second)} cannot take the place of some of shape {np.shape(first)}: "
            "take both from the same model, and from as many pictures"
        )


def patches_in(box: Box, num_patches: int) -> np.ndarray:
    """The patches in a box, bool [N]; its corners x0, y0, x1, y1 are relative to the image's sides, 0..1.

    A patch counts when its centre is inside; a box that holds no centre has the patch under its own.
    """
    side = grid_side(num_patches)
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise DataError(f"box {box} is not possible: give x0,y0,x1,y1 as shares of the picture, 0 <= x0 < x1 <= 1")
    centre = (np.arange(side) + 0.5) / side
    columns, rows = (centre >= x0) & (centre < x1), (centre >= y0) & (centre < y1)
    for inside, middle in ((columns, (x0 + x1) / 2), (rows, (y0 + y1) / 2)):
        if not inside.any():
            inside[min(int(middle * side), side - 1)] = True
    return (rows[:, None] & columns[None]).reshape(-1)


def grid_side(num_patches: int) -> int:
    """G of a square grid of N patches."""
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise DataError(f"{num_patches} patches are no square grid: give the embeddings of whole pictures")
    return side


def swap(first: np.ndarray, second: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """`first` [..., N, D] with `second` at the patches [N] that are marked."""
    check_same_shape(first, second)
    return np.where(patches[:, None], second, first)


def mix(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """share * first + (1 - share) * second."""
    check_same_shape(first, second)
    return share * np.asarray(first, np.float32) + (1 - share) * np.asarray(second, np.float32)


def quantize(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric quantization with a scale for each token: values are about codes * scale.

    Args:
      values: [..., N, D].
      bits: of 16, 8, 4 and 2, the sign included: codes lie in -(2 ** (bits - 1) - 1) .. 2 ** (bits - 1) - 1.

    Returns:
      codes i16 [..., N, D] and scales f32 [..., N, 1].
    """
    if bits not in BITS:
        raise DataError(f"bits={bits} is not possible: give one of {', '.join(map(str, BITS))}")
    largest = 2 ** (bits - 1) - 1
    values = np.asarray(values, np.float32)
    scales = np.abs(values).max(-1, keepdims=True) / largest
    safe = np.where(scales > 0, scales, 1)
    return np.clip(np.round(values / safe), -largest, largest).astype(np.int16), scales.astype(np.float32)


def fake_quantize(values: np.ndarray, bits: int) -> np.ndarray:
    """Quantized to so many bits and dequantized: float32 of the same shape."""
    codes, scales = quantize(values, bits)
    return codes * scales
