"""Objects drawn on a picture: boxes, translucent masks with outlines, and labels that stay inside the picture."""

import bisect
import colorsys
import math
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.processing.decode import to_rgb
from paligemma_jax.tasks.detection import Box, Detection

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont
Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels, x1 and y1 excluded

MASK_OPACITY = 0.4
_HUES = 18
_WIDE_FONTS = ("Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf")
_MIN_FONT = 8.0  # pixels; smaller letters cannot be read
_MAX_LETTERS = 40  # of a label; longer ones would cover the picture
_MAX_SHARE = 1 / 8  # of the picture's area that a label may cover


def draw(image: Image.Image, detections: Sequence[Detection], opacity: float = MASK_OPACITY) -> Image.Image:
    """Draws objects on a copy of a picture.

    Large boxes and masks come first, so that small ones lie on them. Line and letter sizes follow the picture's. A long
    label is shortened; one that would hide what it names, in a picture of a few pixels, is left out.

    Args:
      image: any mode; it is turned upright as its EXIF data says, as it was when it was looked at.
      detections: boxes in pixels of the upright picture; masks, where present, of its size.
      opacity: of masks, 0 (their outline alone) to 1.

    Returns:
      A new RGB picture of the same size, upright.
    """
    image = to_rgb(image, "the picture")
    side = (image.width * image.height) ** 0.5
    line = max(1, round(side / 200))
    canvas = np.array(image)
    masks = [(item.mask, label_color(item.label)) for item in detections if item.mask is not None]
    for mask, color in sorted(masks, key=lambda pair: -pair[0].sum()):
        _paint_mask(canvas, mask, color, line, opacity)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for item in sorted(detections, key=lambda item: -_area(item.box)):
        _outline_box(pen, item.box, picture.size, label_color(item.label), line)
    taken: list[Rect] = []
    for item in detections:
        if (fit := _fit_label(item, side / 34, picture.size)) is not None:
            tag = _render_tag(*fit, label_color(item.label))
            taken.append(place_tag(item.box, tag.size, picture.size, taken))
            picture.paste(tag, taken[-1])
    return picture


def label_color(label: str) -> Color:
    """The colour of a label: vivid, and the same in every picture and process."""
    hue, shade = divmod(zlib.crc32(label.casefold().encode("utf-8", "replace")) % (2 * _HUES), 2)
    red, green, blue = colorsys.hsv_to_rgb(hue / _HUES, (0.85, 0.65)[shade], (0.85, 1.0)[shade])
    return round(255 * red), round(255 * green), round(255 * blue)


def place_tag(box: Box, tag_size: tuple[int, int], size: tuple[int, int], taken: Sequence[Rect]) -> Rect:
    """Finds the place of a label: at its box, inside the picture, and clear of `taken` wherever there is room.

    Args:
      box: (x0, y0, x1, y1) in pixels; it may reach outside the picture.
      tag_size: (width, height) of the tag, at most that of the picture.
      size: (width, height) of the picture.
      taken: places of earlier tags.
    """
    width, height = tag_size
    space = np.array([size[0] - width, size[1] - height])
    x0, y0, x1, y1 = np.round(box)
    home = np.array([x0, y0 - height])  # above the box, flush left
    near = [home, (x0, y0), (x0, y1), (x1 - width, y0 - height), (x0, y1 - height), (x1, y0), (x0 - width, y0)]
    # If a free place exists at all, pushing it left and up ends at the picture's or a tag's edges: this finds one.
    edges = np.array([(0, 0), home, *((right, bottom) for _, _, right, bottom in taken)])
    far = np.stack(np.meshgrid(edges[:, 0], edges[:, 1]), -1).reshape(-1, 2)
    far = far[np.argsort(np.abs(far - home).sum(1), kind="stable")]
    corners = np.clip(np.concatenate([near, far]), 0, space).astype(int)
    rects = np.concatenate([corners, corners + np.array(tag_size)], axis=1)
    best = rects[np.argmin(_overlaps(rects, taken))]
    return tuple(int(v) for v in best)


def _overlaps(rects: np.ndarray, taken: Sequence[Rect]) -> np.ndarray:
    """Area in common with `taken` of each of `rects` [N, 4]: [N]."""
    others = np.array(taken, int).reshape(-1, 4)
    low = np.maximum(rects[:, None, :2], others[None, :, :2])
    high = np.minimum(rects[:, None, 2:], others[None, :, 2:])
    return np.maximum(high - low, 0).prod(-1).sum(-1)


def _fit_label(item: Detection, font_size: float, size: tuple[int, int]) -> tuple[str, Font] | None:
    """The text and font of a label that fits a picture of `size`, made smaller, then shorter; None when none does."""
    label = on_one_line(item.label)
    score = "" if item.score is None else f" {item.score:.2f}"
    fonts = [font_for(label, max(_MIN_FONT, font_size * scale)) for scale in (1.0, 0.8, 0.65)]
    fonts = [font for font in fonts if _tag_size("", font)[1] <= size[1]]
    if len(label) > _MAX_LETTERS:
        label = label[: _MAX_LETTERS - 1].rstrip() + "…"
    for text in ((label + score).strip(), label):
        for font in fonts:
            if text and _fits(text, font, size):
                return text, font
    if not fonts:
        return None
    # Letters add width one by one: the longest beginning that fits is found by halving.
    kept = bisect.bisect_left(range(1, len(label)), True, key=lambda n: not _fits(label[:n] + "…", fonts[-1], size))
    return (label[:kept].rstrip() + "…", fonts[-1]) if kept else None


def _fits(text: str, font: Font, size: tuple[int, int]) -> bool:
    width, height = _tag_size(text, font)
    return width <= size[0] and width * height <= _MAX_SHARE * size[0] * size[1]


def on_one_line(text: str) -> str:
    """A text with single blanks, also where it has what cannot be printed, such as line breaks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def cut_to_width(text: str, font: Font, width: float) -> str:
    """The text, or as much of it as `width` pixels hold, and dots."""
    if font.getlength(text) <= width:
        return text
    # Letters add width one by one: the longest beginning that fits is found by halving.
    kept = bisect.bisect_left(range(1, len(text)), True, key=lambda n: font.getlength(text[:n] + "...") > width)
    return text[:kept].rstrip() + "..."


def font_for(text: str, size: float) -> Font:
    """PIL's own font for ASCII, all it can write; else a common font of wider reach if the machine has one."""
    for name in () if text.isascii() else _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _tag_size(text: str, font: Font) -> tuple[int, int]:
    return math.ceil(font.getlength(text)) + 2 * _padding(font), sum(font.getmetrics()) + _padding(font)


def _padding(font: Font) -> int:
    return round(font.size / 5)


def _render_tag(text: str, font: Font, color: Color) -> Image.Image:
    """A label on its colour, in black or white, whichever is read better, with a rim that parts it from others."""
    tag = Image.new("RGB", _tag_size(text, font), color)
    pen = ImageDraw.Draw(tag)
    pen.rectangle((0, 0, tag.width - 1, tag.height - 1), outline=_darker(color), width=max(1, round(font.size / 24)))
    brightness = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 255_000
    padding = _padding(font)
    pen.text((padding, padding // 2), text, font=font, fill="black" if brightness > 0.55 else "white")
    return tag


def _outline_box(pen: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], color: Color, line: int) -> None:
    """A box clipped to the picture, drawn inwards, with a dark rim that shows on a ground of its own colour."""
    corners = np.round(box).reshape(2, 2)
    (x0, y0), (x1, y1) = np.clip([corners[0], np.maximum(corners[1] - 1, corners[0])], 0, np.subtract(size, 1)).astype(
        int
    )
    rim = line // 3
    if rim:
        pen.rectangle((x0 - rim, y0 - rim, x1 + rim, y1 + rim), outline=_darker(color), width=line + 2 * rim)
    pen.rectangle((x0, y0, x1, y1), outline=color, width=line)


def _paint_mask(canvas: np.ndarray, mask: np.ndarray, color: Color, line: int, opacity: float) -> None:
    """Tints the masked pixels of `canvas` [H, W, 3] in place and outlines them, `line` pixels inwards."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if not len(rows):
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = mask[window]
    core = np.pad(inside, 1)
    for _ in range(line):
        core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    view = canvas[window]
    view[inside] = np.round((1 - opacity) * view[inside] + opacity * np.array(color)).astype(np.uint8)
    view[inside & ~core[1:-1, 1:-1]] = color


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _darker(color: Color) -> Color:
    return color[0] // 3, color[1] // 3, color[2] // 3
