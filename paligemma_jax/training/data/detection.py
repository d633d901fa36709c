"""Pictures with objects as examples: "detect a ; b" and the objects as location tokens, perhaps with mask codes."""

import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from paligemma_jax.errors import DataError
from paligemma_jax.tasks.detection import Box
from paligemma_jax.tasks.overlap import clip_box
from paligemma_jax.tasks.reading import NUM_CODES, is_label
from paligemma_jax.training.data.examples import Example, Examples, Picture, token_bound
from paligemma_jax.training.data.regions import UNIT, Outline, Region, box_around, cells, in_order, to_suffix

Encode = Callable[[np.ndarray], np.ndarray]  # masks f32 [N, 64, 64] to codes i32 [N, 16]

_NO_CODES = (0,) * NUM_CODES  # stand for codes that are not known yet: as many tokens


class DetectionSet(Examples):
    """Examples out of pictures and their objects, in flat arrays.

    Attributes:
      classes: all names, in the order in which prefixes and suffixes have them.
      odd: how many objects were put right or left out, by what was odd about them.
      undrawn: objects without an outline, which cannot be segmented.
    """

    def __init__(self, classes: Sequence[str], encode: Encode | None = None, task: str = "detect"):
        """`encode` is needed for the task "segment" only."""
        if not classes:
            raise DataError("the data set names no classes: annotate an object first")
        for name in classes:
            if not is_label(name):
                raise DataError(f"class {name!r} cannot be written as text: rename it, without ';', '<loc' and '<seg'")
        self.classes = tuple(" ".join(name.split()) for name in classes)
        self.prefix = f"{task} {' ; '.join(self.classes)}"
        self.odd: Counter[str] = Counter()
        self._number = {name: i for i, name in reversed(list(enumerate(self.classes)))}
        self._encode = encode if task == "segment" else None
        self._is_masked = task == "segment"
        self._pictures: list[Picture] = []
        self._places: list[str] = []
        self._sizes = array.array("i")
        self._ends = array.array("q")
        self._labels = array.array("i")
        self._boxes = array.array("d")
        self._outlines: list[Outline] = []
        self._codes: dict[int, tuple[int, ...]] = {}  # by object, once worked out

    def add(self, picture: Picture, where: str, regions: Iterable[Region], size: tuple[int, int] | None = None) -> None:
        """Add a picture.

        Boxes are clipped to it; what has no area in it is left out, and counted, as corners in the wrong order are.

        Raises:
          DataError: an object has no outline, and is to be segmented, or its class is not known.
        """
        kept = []
        for region in regions:
            label = " ".join(region.label.split())
            if label not in self._number:
                raise DataError(f"{where} has the class {label!r}, which is not among those of the data set: add it")
            if (box := self._straight(region.box)) is None:
                continue
            if self._is_masked and region.outline is None:
                raise DataError(
                    f"{where} has an object {label!r} without an outline, and data_task=segment needs one of each: "
                    "annotate polygons or masks, or use data_task=detect"
                )
            kept.append(Region(label, box, region.outline))
        for region in in_order(kept, self.classes):
            self._labels.append(self._number[region.label])
            self._boxes.extend(region.box)
            if self._is_masked and region.outline is not None:
                self._outlines.append(region.outline)
        self._ends.append(len(self._labels))
        self._pictures.append(picture)
        self._places.append(where)
        self._sizes.extend(size or (0, 0))

    def _straight(self, box: Box) -> Box | None:
        """The part of a box in the picture, None when it has no area there."""
        x0, y0, x1, y1 = box
        if not np.isfinite(box).all():
            self.odd["without numbers"] += 1
            return None
        if x0 > x1 or y0 > y1:
            self.odd["reversed"] += 1
            (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        if min(x0, y0) < -1e-4 or max(x1, y1) > 1 + 1e-4:
            self.odd["partly outside"] += 1
        x0, y0, x1, y1 = clip_box((x0, y0, x1, y1), UNIT)
        if x1 > x0 and y1 > y0:
            return x0, y0, x1, y1
        self.odd["without area"] += 1
        return None

    def __len__(self) -> int:
        return len(self._pictures)

    def _objects(self, index: int) -> range:
        return range(self._ends[index - 1] if index else 0, self._ends[index])

    def _region(self, i: int, codes: tuple[int, ...] | None = None) -> Region:
        outline = self._outlines[i] if self._is_masked else None
        return Region(self.classes[self._labels[i]], tuple(self._boxes[4 * i : 4 * i + 4]), outline, codes)

    def at(self, index: int) -> Example:
        objects = self._objects(index)
        if self._is_masked:
            self._work_out(objects)
        return self._example(index, tuple(self._region(i, self._codes.get(i)) for i in objects))

    def _example(self, index: int, regions: tuple[Region, ...]) -> Example:
        size = tuple(self._sizes[2 * index : 2 * index + 2])
        texts = self.prefix, to_suffix(regions), self._places[index]
        return Example((self._pictures[index],), *texts, regions, size if size[0] else None)

    def _work_out(self, objects: range) -> None:
        """Mask codes of some objects, which are kept: encoding takes longer than drawing a picture."""
        missing = [i for i in objects if i not in self._codes]
        if missing:
            if self._encode is None:
                raise DataError("data_task=segment needs the mask VQ-VAE's encoder: open the data with `encode`")
            masks = np.stack([cells(self._outlines[i], tuple(self._boxes[4 * i : 4 * i + 4])) for i in missing])
            for i, codes in zip(missing, self._encode(masks).tolist(), strict=True):
                self._codes[i] = tuple(codes)

    def draft(self, index: int) -> Example:
        codes = _NO_CODES if self._is_masked else None
        return self._example(index, tuple(self._region(i, codes) for i in self._objects(index)))

    def bounds(self) -> np.ndarray:
        rows = np.empty((len(self), 3), np.int32)
        rows[:, 0], rows[:, 1] = 1, token_bound(self.prefix)
        each = 4 + NUM_CODES * self._is_masked + len(" ") + len(" ; ")
        tokens = np.array([each + len(name.encode()) for name in self.classes])[np.array(self._labels, int)]
        totals = np.concatenate([[0], np.cumsum(tokens)])
        ends = np.array(self._ends, int)
        rows[:, 2] = totals[ends] - totals[np.concatenate([[0], ends[:-1]])]
        return rows


def polygon_region(label: str, polygons: Sequence[np.ndarray]) -> Region:
    """An object of which only its polygons are known."""
    return Region(label, box_around(polygons), tuple(polygons))
