"""Location and segmentation tokens as text, to and from objects with a label, a box and mask codes.

One object is `<locYYYY><locXXXX><locYYYY><locXXXX> label`: y_min, x_min, y_max, x_max on a scale of 0..1023 over the
picture. With a mask, 16 tokens `<seg000>`..`<seg127>` stand between the box and the label. Objects are joined by ";".
Source: big_vision/configs/proj/paligemma and its refcoco_mask2str.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from paligemma_jax.errors import DataError

NUM_LOCS = 1024  # location tokens in the vocabulary
NUM_CODES = 16  # segmentation tokens of one mask

Box = tuple[float, float, float, float]

_LOC = r"<loc(0[0-9]{3}|10[01][0-9]|102[0-3])>"
_SEG = r"<seg(0[0-9]{2}|1[01][0-9]|12[0-7])>"
_OBJECT = re.compile(rf"((?:{_LOC}\s*){{4}})((?:{_SEG}\s*){{16}})?(\S.*)", re.DOTALL)
# A token, or what is left of one: in a label it means that the object is malformed.
_TOKEN_LIKE = re.compile(r"<(?:loc|seg)|<(?:lo?|se?)$")


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object of a picture.

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


def parse(text: str, size: tuple[int, int], loc_scale: int = 1023) -> tuple[list[Detection], list[str]]:
    """Reads the objects in a generated text.

    Between two semicolons stands one object: exactly four location tokens, none or exactly 16 segmentation tokens, and
    a label, with spaces anywhere between them. Everything else there is returned as dropped, unless it is empty.
    Corners in the wrong order are put right; a box without area is kept. A text without any location or segmentation
    token is an answer in words: nothing is found, nothing dropped. No text raises an error.

    Args:
      text: what the model wrote, special tokens such as <eos> removed.
      size: (width, height) of the picture in pixels.
      loc_scale: the location that means the far edge; 1023 as PaliGemma was trained, 1024 in some tools.

    Returns:
      The objects in their order, and the text of each dropped one.

    Raises:
      DataError: `loc_scale` is not above 0.
    """
    if not loc_scale > 0:
        raise DataError(f"loc_scale={loc_scale!r} is not possible: give the location of the far edge, usually 1023")
    found: list[Detection] = []
    dropped: list[str] = []
    if "<loc" not in text and "<seg" not in text:
        return found, dropped
    for piece in re.finditer(r"[^;]+", text):
        fragment = piece.group().strip()
        if not fragment:
            continue
        match = _OBJECT.fullmatch(fragment)
        if match is None or _TOKEN_LIKE.search(match[5]):
            dropped.append(fragment)
            continue
        locations = [int(v) for v in re.findall(_LOC, match[1])]
        codes = tuple(int(v) for v in re.findall(_SEG, match[3])) if match[3] else None
        found.append(
            Detection(
                label=" ".join(match[5].split()),
                box=to_box(locations, size, loc_scale),
                codes=codes,
                span=piece.span(),
            )
        )
    return found, dropped


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


def is_label(text: str) -> bool:
    """Whether an object can have this label, so that `parse` finds it again."""
    return bool(text) and ";" not in text and not _TOKEN_LIKE.search(text)


def _format_object(item: Detection, size: tuple[int, int], loc_scale: int) -> str:
    label = " ".join(item.label.split())
    if not is_label(label):
        raise DataError(f"label {item.label!r} cannot be written as text: use words without ';', '<loc' and '<seg'")
    codes = item.codes or ()
    if len(codes) not in (0, NUM_CODES):
        raise DataError(f"object {label!r} has {len(codes)} mask codes: give {NUM_CODES}, or none")
    segs = "".join(f"<seg{v:03d}>" for v in codes)
    return f"{format_box(item.box, size, loc_scale)}{segs} {label}"
