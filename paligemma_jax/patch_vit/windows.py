"""Maps of pictures of any size: overlapping windows, each looked at by itself, and one map out of theirs.

A window is a part of the picture, about square, that becomes one input of the model. Windows begin at whole cells of
the map that they make together, so their maps are averaged cell by cell, without resampling.

Axes: W windows, T phrases, G patches of a side of the model's input, R and C rows and columns of the whole map.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from paligemma_jax.errors import ConfigError

WHOLE, AUTO = "off", "auto"
MOST = 8  # windows along the shorter side
_MOST_AUTO = 3
_SQUEEZE = 1.25  # a side up to so many windows long is squeezed into one
_SHRINK = 2  # by which a window is made smaller at least, where `AUTO` chooses

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where windows lie.

    size: (width, height) of the picture.
    side: G.
    shape: (R, C), each at least G.
    corners: row and column of the first cell of each window.
    """

    size: tuple[int, int]
    side: int
    shape: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def box(self, corner: tuple[int, int]) -> Rect:
        """The pixels of a window."""
        across = _pixels(corner[1], self.side, self.shape[1], self.size[0])
        down = _pixels(corner[0], self.side, self.shape[0], self.size[1])
        return across[0], down[0], across[1], down[1]

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """The windows of a picture, which itself is the only one of its."""
        if len(self.corners) == 1:
            return [image]
        return [image.crop(self.box(corner)) for corner in self.corners]


def layout(size: tuple[int, int], side: int, pixels: int, choice: str | int = AUTO) -> Layout:
    """Windows of a picture.

    Along the shorter side of the picture lie `choice` windows, and as many of the same size along the longer one;
    between each two neighbours lies one more, half over either. `AUTO` takes as many as there are in it of twice the
    model's input, from 1 to 3: so nothing is enlarged, and a small picture that is about square has one window.

    Args:
      size: (width, height) of the picture.
      side: G.
      pixels: side of the model's input.
      choice: a number from 1 to `MOST`, `AUTO`, or `WHOLE`: one window, whatever the shape of the picture.

    Raises:
      ConfigError: another choice.
    """
    count = str(choice)
    if count == WHOLE:
        return Layout(size, side, (side, side), ((0, 0),))
    if count != AUTO and not (count.isdecimal() and 1 <= int(count) <= MOST):
        raise ConfigError(f"windows={choice!r} is not possible: give {AUTO}, {WHOLE} or a number from 1 to {MOST}")
    shorter = min(size)
    along = min(max(shorter // (_SHRINK * pixels), 1), _MOST_AUTO) if count == AUTO else int(count)
    shape = tuple(_cells(length * along / shorter, side) for length in reversed(size))
    starts = [_starts(cells, side) for cells in shape]
    return Layout(size, side, shape, tuple(itertools.product(*starts)))


def average(maps: np.ndarray, windows: Layout) -> np.ndarray:
    """One map [T, R, C] of the maps [W, T, G, G] of windows.

    A patch counts the more the further it lies from the edge of its window, where it has seen less around it.
    """
    inwards = np.minimum(np.arange(windows.side), np.arange(windows.side)[::-1]) + 1.0
    weight = inwards[:, None] * inwards
    total = np.zeros((maps.shape[1], *windows.shape))
    weights = np.zeros(windows.shape)
    for (row, column), values in zip(windows.corners, maps, strict=True):
        place = np.s_[row : row + windows.side, column : column + windows.side]
        total[:, *place] += weight * values
        weights[place] += weight
    return (total / weights).astype(maps.dtype)


def _cells(windows: float, side: int) -> int:
    return side if windows <= _SQUEEZE else round(windows * side)


def _starts(cells: int, side: int) -> Sequence[int]:
    """First cells of windows over so many cells, at most half a window apart."""
    steps = -(-(cells - side) // max(side // 2, 1))
    return [round(i * (cells - side) / steps) for i in range(steps + 1)] if steps else [0]


def _pixels(start: int, side: int, cells: int, length: int) -> tuple[int, int]:
    """The first and last + 1 pixel of some cells of a side of `length` pixels; there is one at least."""
    first, last = (round(cell * length / cells) for cell in (start, start + side))
    first = min(first, length - 1)
    return first, max(last, first + 1)
