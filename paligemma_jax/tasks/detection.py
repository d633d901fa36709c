"""Location and segmentation tokens as text, to and from objects with a label, a box and mask codes.

One object is `<locYYYY><locXXXX><locYYYY><locXXXX> label`: y_min, x_min, y_max, x_max on a scale of 0..1023 over the
picture. With a mask, 16 tokens `<seg000>`..`<seg127>` stand between the box and the label. Objects are joined by ";".
Some fine-tunes write no label, as those on RefCOCO do, or write it elsewhere: `reading` finds whose label words are.
Source: big_vision/configs/proj/paligemma and its refcoco_mask2str.
"""

import bisect
import dataclasses
import numbers
import re
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.reading import NUM_CODES, is_label, read

NUM_LOCS = 1024  # location tokens in the vocabulary

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object of a picture.

    label: what it is, "" when that is not known.
    box: (x0, y0, x1, y1) in pixels, x0 <= x1 and y0 <= y1.
    score: confidence in 0..1, None when unknown; `tasks.confidence` says how it is worked out.
    codes: the 16 segmentation indices, row by row over a 4x4 grid, None without a mask.
    mask: [H, W] bool over the whole picture, None until the codes are decoded.
    span: start and end of the object in the text it was parsed from, to line it up with token probabilities.
    side_probabilities: of the exact locations of x0, y0, x1, y1, None when unknown.
    expected_box: mean of the box, in pixels, under the model's distribution over locations, None when unknown.
    """

    label: str
    box: Box
    score: float | None = None
    codes: tuple[int, ...] | None = None
    mask: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    span: tuple[int, int] | None = dataclasses.field(default=None, compare=False, repr=False)
    side_probabilities: Box | None = dataclasses.field(default=None, compare=False, repr=False)
    expected_box: Box | None = dataclasses.field(default=None, compare=False, repr=False)


def _is_positive(value: object) -> bool:
    return isinstance(value, numbers.Real) and 0 < value <= sys.maxsize


def parse(
    text: str, size: tuple[int, int], loc_scale: int = 1023, labels: Sequence[str] = ()
) -> tuple[list[Detection], list[str]]:
    """Reads the objects in a generated text.

    An object is four location tokens, perhaps 16 segmentation tokens behind them, and perhaps a label. Every complete
    one is found, wherever it stands: joined to the next by ";", comma, line break or nothing, with words around it. Its
    label is the words behind it, up to the next ";", line break or object; "" without any. Words in front of a box are
    its label when two or more boxes have them and none stand behind the last box, or when they are one of `labels`.

    What is incomplete is returned as dropped: one to three location tokens, or more than fit whole boxes; another
    number of segmentation tokens, or some without a box; words alone behind a ";". Where the text ends too early the
    boxes before are kept. Corners in the wrong order are put right; a box without area is kept. A text without any
    location or segmentation token is an answer in words: nothing is found, nothing dropped. No text raises an error.

    Args:
      text: what the model wrote; <eos> and <pad> at its end make no difference.
      size: (width, height) of the picture in pixels.
      loc_scale: the location that means the far edge; 1023 as PaliGemma was trained, 1024 in some tools.
      labels: the classes that were asked for, if known; the only one is the label of an object that has none.

    Returns:
      The objects in their order, and the text of each dropped one.

    Raises:
      DataError: a text that is none, or a `size` or `loc_scale` that no picture has.
    """
    if not isinstance(text, str):
        raise DataError(f"an answer is a text, not {type(text).__name__}: {text!r:.80}")
    if not _is_positive(loc_scale):
        raise DataError(f"loc_scale={loc_scale!r:.80} is not possible: give the location of the far edge, usually 1023")
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2 or not all(map(_is_positive, size)):
        raise DataError(f"size={size!r:.80} is not possible: give (width, height) of the picture in pixels")
    while (text := text.rstrip()).endswith(("<eos>", "<pad>")):
        text = text[:-5]
    items = read(text, labels)
    found = [
        Detection(item.label, to_box(item.locs, size, loc_scale), codes=item.codes or None, span=item.span)
        for item in items
        if item.locs
    ]
    dropped = [item.span for item in items if not item.locs]
    starts = [item.start for item in items]
    for piece in re.finditer(r"[^;]+", text):
        before, upto = (bisect.bisect_left(starts, edge) for edge in piece.span())
        if before == upto > 0 and not piece[0].isspace():  # without an item, behind the first one
            dropped.append(piece.span())
    return found, [text[start:stop].strip() for start, stop in sorted(dropped)]


def to_box(locations: Sequence[float], size: tuple[int, int], loc_scale: int = 1023) -> Box:
    """Locations y0, x0, y1, x1 to a box x0, y0, x1, y1 in pixels of a picture of `size`; corners are put in order."""
    width, height = size
    y0, x0, y1, x1 = (float(v) / loc_scale for v in locations)
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    return x0 * width, y0 * height, x1 * width, y1 * height


def format_box(box: Box, size: tuple[int, int], loc_scale: int = 1023) -> str:
    """Four location tokens of a box (x0, y0, x1, y1) in pixels of a picture of `size` (width, height)."""
    width, height = size
    x0, y0, x1, y1 = box
    if not (np.isfinite(box).all() and width > 0 and height > 0):
        raise DataError(f"box {box} in a picture of {width} x {height} pixels: give finite corners and a positive size")
    corners = np.array([y0 / height, x0 / width, y1 / height, x1 / width])
    locs = np.clip(np.round(corners * loc_scale), 0, NUM_LOCS - 1).astype(int)
    return "".join(f"<loc{v:04d}>" for v in locs)


def format_objects(objects: Iterable[Detection], size: tuple[int, int], loc_scale: int = 1023) -> str:
    """The text that a model should write for these objects; `parse` reads it back. No objects give an empty text."""
    return " ; ".join(_format_object(item, size, loc_scale) for item in objects)


def _format_object(item: Detection, size: tuple[int, int], loc_scale: int) -> str:
    label = " ".join(item.label.split())
    if label and not is_label(label):
        raise DataError(f"label {item.label!r} cannot be written as text: use words without ';', '<loc' and '<seg'")
    codes = item.codes or ()
    if len(codes) not in (0, NUM_CODES):
        raise DataError(f"object {label!r} has {len(codes)} mask codes: give {NUM_CODES}, or none")
    segs = "".join(f"<seg{v:03d}>" for v in codes)
    return f"{format_box(item.box, size, loc_scale)}{segs} {label}".rstrip()
