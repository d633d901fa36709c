"""Masks in the forms of other programs: SVG paths, and Label Studio's run lengths."""

from collections.abc import Iterator

import numpy as np

_SIZES = (3, 4, 8, 16)  # bits that a run's length may have
_VALUE_BITS = 8
_LONGEST = 2**16


def svg_path(mask: np.ndarray) -> str:
    """The outlines of a mask, as an SVG path in a square of 0 to 1 over the whole array; "" for an empty one.

    Args:
      mask: [M, N] bool; cells that touch at a corner only are apart.
    """
    rows, columns = mask.shape
    paths = []
    for loop in _loops(mask):
        corners = [f"{x / columns:.4g} {y / rows:.4g}" for y, x in loop]
        paths.append(f"M {' L '.join(corners)} Z")
    return " ".join(paths)


def brush_rle(mask: np.ndarray) -> list[int]:
    """A mask [H, W] bool as Label Studio's `rle`: bytes that hold the values 0 and 255 of four channels.

    The bits are: 32 for the number of values; 5 for the bits of a value, less one; four times 4 for the bits of a
    length, less one; then for each run a 1, 2 for which of these sizes, the length less one, and the value.
    """
    values = mask.reshape(-1)
    edges = np.flatnonzero(np.diff(values)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [len(values)]])) * 4
    bits = [f"{len(values) * 4:032b}", f"{_VALUE_BITS - 1:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for start, length in zip(starts, lengths, strict=True):
        value = f"{255 if values[start] else 0:08b}"
        for part in [_LONGEST] * (length // _LONGEST) + [length % _LONGEST] * bool(length % _LONGEST):
            size = next(i for i, size in enumerate(_SIZES) if part <= 2**size)
            bits.append(f"1{size:02b}{part - 1:0{_SIZES[size]}b}{value}")
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def _loops(mask: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """Closed outlines as corners (row, column), the inside to the right of the way; without corners on a straight."""
    padded = np.pad(mask.astype(np.int8), 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(edges: np.ndarray, start: tuple[int, int], stop: tuple[int, int]) -> None:
        for y, x in edges.tolist():
            following.setdefault((y + start[0], x + start[1]), []).append((y + stop[0], x + stop[1]))

    inside = padded[1:-1, 1:-1] == 1
    add(np.argwhere(inside & (padded[:-2, 1:-1] == 0)), (0, 0), (0, 1))  # above, to the right
    add(np.argwhere(inside & (padded[1:-1, 2:] == 0)), (0, 1), (1, 1))  # right, down
    add(np.argwhere(inside & (padded[2:, 1:-1] == 0)), (1, 1), (1, 0))  # below, to the left
    add(np.argwhere(inside & (padded[1:-1, :-2] == 0)), (1, 0), (0, 0))  # left, up
    while following:
        start = point = next(iter(following))
        loop: list[tuple[int, int]] = []
        way = (0, 0)
        while True:
            choices = following[point]
            # At a corner that two cells share, turn right, which stays at the same cell.
            right = (point[0] + way[1], point[1] - way[0])
            step = choices.pop(choices.index(right) if right in choices else 0)
            if not choices:
                del following[point]
            new = (step[0] - point[0], step[1] - point[1])
            if new != way:
                loop.append(point)
            point, way = step, new
            if point == start:
                break
        if len(loop) > 1 and way == (loop[1][0] - loop[0][0], loop[1][1] - loop[0][1]):
            loop.pop(0)
        yield loop
