"""Changes of pictures at random that keep boxes, masks and words true.

Every change is a function of the seed and of the example's counter alone, so a run that goes on shows the same.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from PIL import Image, ImageEnhance

from paligemma_jax.errors import ConfigError
from paligemma_jax.tasks.detection import Box, format_objects, parse
from paligemma_jax.tasks.prompts import read_prompt
from paligemma_jax.training.data.examples import Example
from paligemma_jax.training.data.regions import UNIT, Grid, Region, cells, in_order, to_suffix

KINDS = ("flip", "crop", "scale", "color")
_FOR_READING = ("scale", "color")  # of text, which is neither mirrored nor cut
FLIP = 0.5  # probability
CROP_AREA = (0.5, 1.0)  # share of the picture that is kept
CROP_STRETCH = 0.75  # narrowest crop, as its width by its height in shares of the picture's sides
SCALE = (0.5, 1.0)  # of the sides of the picture on a grey ground
COLOR = (0.7, 1.3)  # factors of brightness, contrast and saturation
LEAST_VISIBLE = 0.35  # share of its area with which an object counts as still there

_GROUND = (127, 127, 127)
_SIDES = re.compile(r"\b(left|right)(most|wards?|side|hand)?\b", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}
_SEPARATOR = re.compile(r"\s*;\s*")


class Codec(Protocol):
    """Masks to codes and back; see `masks.MaskCodec`."""

    def encode(self, masks: np.ndarray) -> np.ndarray: ...

    def decode(self, codes: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown of a picture.

    size: (width, height) of the picture in pixels.
    window: (x0, y0, x1, y1) in its pixels; it may reach beyond the picture, where it is grey.
    flip: mirrored left to right.
    """

    size: tuple[int, int]
    window: tuple[int, int, int, int]
    flip: bool = False

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "View":
        return cls(size, (0, 0, *size))

    @property
    def is_whole(self) -> bool:
        return self.window == (0, 0, *self.size) and not self.flip

    def show(self, image: Image.Image) -> Image.Image:
        """The picture as it is seen; its `info` stays."""
        x0, y0, x1, y1 = self.window
        if self.window != (0, 0, *self.size):
            inside = (max(x0, 0), max(y0, 0), min(x1, self.size[0]), min(y1, self.size[1]))
            part = image.crop(inside)
            canvas = Image.new("RGB", (x1 - x0, y1 - y0), _GROUND)
            canvas.paste(part, (inside[0] - x0, inside[1] - y0))
            canvas.info = image.info
            image = canvas
        if self.flip:
            info = image.info
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image.info = info
        return image

    def visible(self, box: Box) -> Box:
        """The part of a box, in shares of the picture's sides, that is seen; without area when none is."""
        (x0, x1), (y0, y1) = (
            (max(low, self.window[i] / self.size[i]), min(high, self.window[i + 2] / self.size[i]))
            for i, low, high in ((0, box[0], box[2]), (1, box[1], box[3]))
        )
        return x0, y0, max(x0, x1), max(y0, y1)

    def moved(self, box: Box) -> Box:
        """A box in shares of the picture's sides in those of the view."""
        if self.window != (0, 0, *self.size):
            (x0, x1), (y0, y1) = (
                tuple((v * self.size[i] - self.window[i]) / (self.window[i + 2] - self.window[i]) for v in pair)
                for i, pair in ((0, box[::2]), (1, box[1::2]))
            )
            box = x0, y0, x1, y1
        return (1 - box[2], box[1], 1 - box[0], box[3]) if self.flip else box


@dataclasses.dataclass(frozen=True)
class Draw:
    """What was drawn for an example; all of it always, so that one kind does not depend on the others."""

    flip: bool
    area: float
    stretch: float
    place: tuple[float, float]
    scale: float
    ground: tuple[float, float]
    color: tuple[float, float, float]

    @classmethod
    def of(cls, seed: int, counter: int) -> "Draw":
        values = np.random.default_rng((seed % 2**63, counter)).random(10)
        low, high = (CROP_STRETCH**0.5, CROP_STRETCH**-0.5)
        return cls(
            bool(values[0] < FLIP),
            _between(CROP_AREA, values[1]),
            low * (high / low) ** values[2],
            (values[3], values[4]),
            _between(SCALE, values[5]),
            (values[6], values[7]),
            tuple(_between(COLOR, v) for v in np.random.default_rng((seed % 2**63, counter, 1)).random(3)),
        )


def _between(limits: tuple[float, float], share: float) -> float:
    return float(limits[0] + (limits[1] - limits[0]) * share)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of examples.

    kinds: some of `KINDS`.
    codec: for examples with mask codes; without it their pictures keep their geometry.
    """

    kinds: tuple[str, ...]
    seed: int
    codec: Codec | None = None

    @property
    def flips(self) -> bool:
        return "flip" in self.kinds

    def __call__(
        self, example: Example, images: Sequence[Image.Image], counter: int
    ) -> tuple[list[Image.Image], str, str]:
        """Pictures, prefix and suffix, changed.

        Text to be read (`ocr`) is neither mirrored nor cut. Examples with several pictures, and those with locations
        that cannot be written anew (in the prefix, or with words around them), change in their colours only; so do
        those that ask for a single thing that would be lost.
        """
        draw = Draw.of(self.seed, counter)
        shown, prefix, suffix = list(images), example.prefix, example.suffix
        if len(images) == 1 and (regions := read_regions(example)) is not None:
            prompt = read_prompt(prefix)
            kinds = _FOR_READING if prompt.task is not None and prompt.task.name == "ocr" else KINDS
            view = self._view(draw, images[0].size, set(kinds).intersection(self.kinds))
            texts = self._texts(example, regions, view)
            if texts is not None:
                (prefix, suffix), shown = texts, [view.show(images[0])]
        if "color" in self.kinds:
            shown = [jitter(image, draw.color) for image in shown]
        return shown, prefix, suffix

    def _view(self, draw: Draw, size: tuple[int, int], kinds: Collection[str]) -> View:
        """A crop, and a wider window around it, which makes it smaller; grey is only where the picture ends."""
        window = (0, 0, *size)
        if "crop" in kinds:
            shares = (min(1.0, (draw.area * draw.stretch) ** 0.5), min(1.0, (draw.area / draw.stretch) ** 0.5))
            width, height = (max(1, round(share * side)) for share, side in zip(shares, size, strict=True))
            x, y = (round(u * free) for u, free in zip(draw.place, (size[0] - width, size[1] - height), strict=True))
            window = (x, y, x + width, y + height)
        if "scale" in kinds:
            width, height = window[2] - window[0], window[3] - window[1]
            wide, high = max(width, round(width / draw.scale)), max(height, round(height / draw.scale))
            x, y = (round(u * free) for u, free in zip(draw.ground, (wide - width, high - height), strict=True))
            window = (window[0] - x, window[1] - y, window[0] - x + wide, window[1] - y + high)
        return View(size, window, "flip" in kinds and draw.flip)

    def _texts(self, example: Example, regions: Sequence[Region], view: View) -> tuple[str, str] | None:
        """Prefix and suffix of a view; None when what was asked for is not in it."""
        if view.is_whole:
            return example.prefix, example.suffix
        prefix = mirrored_prompt(example.prefix) if view.flip else example.prefix
        if not regions:
            return prefix, mirrored(example.suffix) if view.flip else example.suffix
        masked = any(region.codes is not None for region in regions)
        if masked and self.codec is None:
            return None
        kept = [(region, view.visible(region.box)) for region in regions]
        kept = [(region, box) for region, box in kept if _area(box) >= LEAST_VISIBLE * _area(region.box)]
        labels = read_prompt(prefix).labels
        if not kept and not labels:
            return None
        codes = self._codes([pair for pair in kept if pair[0].codes is not None], view) if masked else {}
        shown = [
            Region(mirrored(r.label) if view.flip else r.label, view.moved(box), codes=codes.get(id(r)))
            for r, box in kept
        ]
        return prefix, to_suffix(shown if example.regions is None else in_order(shown, labels))

    def _codes(self, kept: Sequence[tuple[Region, Box]], view: View) -> dict[int, tuple[int, ...]]:
        """Mask codes of what is seen of some objects, by their identity."""
        if not kept:
            return {}
        known = [region for region, _ in kept if region.outline is None]
        masks = self.codec.decode(np.array([r.codes for r in known], np.int32)) > 0 if known else ()
        grids = {id(region): Grid(mask, region.box) for region, mask in zip(known, masks, strict=True)}
        seen = np.stack([cells(region.outline or grids[id(region)], box) for region, box in kept])
        codes = self.codec.encode(seen[:, :, ::-1] if view.flip else seen).tolist()
        return {id(region): tuple(row) for (region, _), row in zip(kept, codes, strict=True)}


def read_kinds(text: str) -> tuple[str, ...]:
    """The kinds in "flip,crop"; ConfigError for others."""
    kinds = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if strange := [name for name in kinds if name not in KINDS]:
        raise ConfigError(f"augment={text!r} is not possible: {strange[0]!r} is not one of {', '.join(KINDS)}")
    return kinds


def read_regions(example: Example) -> Sequence[Region] | None:
    """The objects of an example, none for an answer in words; None when its locations cannot be written anew."""
    if "<loc" in example.prefix or "<seg" in example.prefix:
        return None
    if example.regions is not None:
        return example.regions
    if "<loc" not in example.suffix and "<seg" not in example.suffix:
        return ()
    found, dropped = parse(example.suffix, UNIT)
    if dropped or _SEPARATOR.sub(" ; ", example.suffix.strip()) != format_objects(found, UNIT):
        return None
    return [Region(item.label, item.box, codes=item.codes) for item in found]


def mirrored(text: str) -> str:
    """A text with left for right and right for left, in the same letters' case."""

    def other(match: re.Match[str]) -> str:
        word = _OTHER[match[1].lower()]
        word = word.upper() if match[1].isupper() else word.capitalize() if match[1][0].isupper() else word
        return word + (match[2] or "")

    return _SIDES.sub(other, text)


def mirrored_prompt(prompt: str) -> str:
    """`mirrored`; but classes that have both sides among them stay in their order."""
    labels = read_prompt(prompt).labels
    return prompt if labels and {mirrored(label) for label in labels} == set(labels) else mirrored(prompt)


def jitter(image: Image.Image, factors: tuple[float, float, float]) -> Image.Image:
    """A picture with brightness, contrast and saturation multiplied."""
    info = image.info
    for enhancer, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        image = enhancer(image).enhance(factor)
    image.info = info
    return image


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
