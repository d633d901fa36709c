"""Where a student and its teacher look, side by side, without any text.

Axes: G patches of a side of the student, P of the teacher.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from paligemma_jax.patch_vit.activation import in_batches
from paligemma_jax.patch_vit.models import Clip, Student


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Maps over one picture squeezed to a square, each with the sum 1.

    student: share of each patch in the image embedding, f32 [G, G].
    resized: the same on the teacher's grid, f32 [P, P].
    teacher: attention of the class token in the last block, the mean over heads, f32 [P, P].
    """

    student: np.ndarray
    resized: np.ndarray
    teacher: np.ndarray

    @property
    def correlation(self) -> float:
        """Pearson's, between the teacher's and the student's values on the same grid; NaN where one is even."""
        first, second = (values.ravel() - values.mean() for values in (self.resized, self.teacher))
        lengths = np.linalg.norm(first) * np.linalg.norm(second)
        return float(first @ second / lengths) if lengths else float("nan")


def compare(student: Student, clip: Clip, images: Sequence[Image.Image], batch_size: int = 16) -> Iterator[Comparison]:
    """The maps of some RGB pictures. The teacher sees them squeezed too, or its patches would lie elsewhere."""
    squeezed = dataclasses.replace(clip.settings, crop=False)
    shares = in_batches(lambda pixels: student.embed(pixels)[1], map(student.settings.one, images), batch_size)
    attention = in_batches(clip.cls_attention, map(squeezed.one, images), batch_size)
    for share, attended in zip(shares, attention, strict=True):
        first, second = square(share), square(attended)
        second = second / second.sum()
        yield Comparison(first, resize_by_area(first, second.shape), second)


def square(values: np.ndarray) -> np.ndarray:
    """Values of patches [N] as their grid."""
    side = round(len(values) ** 0.5)
    return values.reshape(side, side)


def resize_by_area(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map [R, C] on another grid over the same area: each cell gets the parts of others that lie in it, f32."""
    rows, columns = (_overlaps(old, new) for old, new in zip(values.shape, shape, strict=True))
    return (rows @ np.asarray(values, np.float64) @ columns.T).astype(np.float32)


def _overlaps(old: int, new: int) -> np.ndarray:
    """Share of each of `old` equal parts of a line that lies in each of `new`: [new, old]."""
    low = np.maximum(np.arange(old) / old, np.arange(new)[:, None] / new)
    high = np.minimum(np.arange(1, old + 1) / old, np.arange(1, new + 1)[:, None] / new)
    return np.maximum(high - low, 0) * old
