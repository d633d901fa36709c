"""Objects as YOLO's text: a line `class cx cy w h` for each, centre and size as shares of the picture's sides.

Masks have no place in it. `classes.txt` holds the names, one per line: the first is class 0.
"""

from collections.abc import Sequence

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.classes import number_of, numbered
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.overlap import clip_box
from paligemma_jax.tasks.select import known_score


def to_yolo(
    detections: Sequence[Detection], size: tuple[int, int], classes: Sequence[str], confidence: bool = False
) -> str:
    """The text of a picture's file of labels; nothing is found: an empty text.

    Boxes are clipped to the picture; those without any area in it are left out.

    Args:
      detections: objects of one picture.
      size: (width, height) of the picture in pixels.
      classes: names by their number.
      confidence: end each line with the score, 0 when it is unknown; trainers take lines without it only.

    Raises:
      DataError: a label is not among the classes, or the picture has no pixels.
    """
    width, height = size
    if not (width > 0 and height > 0):
        raise DataError(f"a picture of {width} x {height} pixels has no shares of its sides: give its size")
    numbers = numbered(classes)
    lines = []
    for item in detections:
        number = number_of(item.label, numbers)
        x0, y0, x1, y1 = clip_box(item.box, size)
        if x1 > x0 and y1 > y0:
            shares = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            values = (*shares, known_score(item)) if confidence else shares
            lines.append(" ".join([str(number), *(f"{v:.6f}" for v in values)]) + "\n")
    return "".join(lines)


def class_file(classes: Sequence[str]) -> str:
    """The text of classes.txt."""
    return "".join(f"{' '.join(name.split())}\n" for name in classes)
