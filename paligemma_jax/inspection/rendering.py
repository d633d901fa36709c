"""Rendering with PIL: a colour map, heat maps over the image, sheets of many, words on patches, tables of words, raw
embeddings.

Axes: G patches of a side, M maps, I images, N tokens, D width, H and W in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.tasks.draw import Font, cut_to_width, font_for

Bounds = tuple[float, float]

# Nine points of matplotlib's inferno (CC0), a perceptually uniform colour map.
INFERNO = ("#000004", "#210c4a", "#57106e", "#8a226a", "#bc3754", "#e45a31", "#f98e09", "#f9cb35", "#fcffa4")
_POINTS = np.array([list(bytes.fromhex(color[1:])) for color in INFERNO], np.float32)

_OPACITY = (0.45, 0.75)  # of a map where it is lowest and highest
_GREY = 0.6  # how far the image is desaturated under a map
_SIDES = (512, 1024)  # bounds of the longer side of a displayed image
_THUMBNAIL = 200  # longer side of an image on a sheet
_PATCH = 72  # pixels that a word has room in
_LARGEST = 2048  # side of an image with words on it
_MOST_PIXELS = (1200, 900)  # width and height that embeddings are enlarged to at most
_CUT = 0.5  # percentile of the embeddings at either end where the colours saturate
_CELL = (92, 22)  # pixels of a table's cell
_GAP = 10
_LEAST_WIDTH = 320
_LIGHT = (0.2126, 0.7152, 0.0722)  # weights of red, green and blue in luminance
_INK, _FAINT, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)


def colors(values: np.ndarray) -> np.ndarray:
    """Values [...] in 0..1 to colours uint8 [..., 3]; NaN becomes grey."""
    position = np.clip(np.nan_to_num(values, nan=0.0), 0, 1) * (len(_POINTS) - 1)
    low = np.minimum(position.astype(int), len(_POINTS) - 2)
    share = (position - low)[..., None]
    mixed = np.round(_POINTS[low] * (1 - share) + _POINTS[low + 1] * share).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], np.uint8(128), mixed)


def extremes(values: np.ndarray) -> Bounds:
    """Smallest and largest finite value; zeros if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def scaled(values: np.ndarray, bounds: Bounds | None = None) -> np.ndarray:
    """Values to 0..1, from `bounds` or from the smallest and largest; all zeros where these are the same."""
    low, high = bounds or extremes(values)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def overlay(image: Image.Image, values: np.ndarray, bounds: Bounds | None = None) -> Image.Image:
    """A map [G, G] as a translucent layer over the whole of an image, whose size stays and whose colours fade."""
    smooth = Image.fromarray(scaled(values, bounds).astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(smooth), 0, 1)
    opacity = (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * np.nan_to_num(share))[..., None]
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    faded = _GREY * grey + (1 - _GREY) * np.asarray(image.convert("RGB"), np.float32)
    return Image.fromarray(((1 - opacity) * faded + opacity * colors(share)).round().astype(np.uint8))


def heat_map(image: Image.Image, values: np.ndarray, title: str) -> Image.Image:
    """A map [G, G] over an image, with a title and a colour bar."""
    return _titled(overlay(displayed(image), values), title, extremes(values))


def sheet(
    image: Image.Image,
    values: np.ndarray,
    captions: Sequence[str],
    title: str,
    columns: int | None = None,
    shared: bool = False,
) -> Image.Image:
    """Many maps [M, G, G] over one image, each with its caption.

    Args:
      columns: maps in a row; None makes the sheet a little wider than high.
      shared: one scale of colours for all maps, else each has its own.
    """
    small = _sized(image, _THUMBNAIL)
    columns = columns or min(len(values), max(1, round(math.sqrt(1.4 * len(values) * small.height / small.width))))
    bounds = extremes(values) if shared else None
    head = 20
    across, down = max(small.width, 100) + _GAP, head + small.height + _GAP
    body = Image.new("RGB", (columns * across - _GAP, math.ceil(len(values) / columns) * down - _GAP), _PAPER)
    pen = ImageDraw.Draw(body)
    for i, (item, caption) in enumerate(zip(values, captions, strict=True)):
        x, y = i % columns * across, i // columns * down
        text = printable(caption)
        font = font_for(text, 13)
        pen.text((x, y), cut_to_width(text, font, across - _GAP), font=font, fill=_INK)
        body.paste(overlay(small, item, bounds), (x, y + head))
    return _titled(body, title, bounds)


def worded(image: Image.Image, words: Sequence[Sequence[str]], values: np.ndarray, title: str) -> Image.Image:
    """A word on every patch of an image, [G, G] of them, over a map [G, G], such as its probability."""
    side = len(words)
    least = min(_LARGEST, _PATCH * side * max(image.size) // min(image.size))
    base = np.asarray(overlay(displayed(image, least), values), np.float32)
    body = Image.fromarray((0.5 * base).astype(np.uint8))  # dark enough for white letters
    pen = ImageDraw.Draw(body)
    across, down = body.width / side, body.height / side
    for i in range(1, side):
        pen.line((i * across, 0, i * across, body.height), fill=(96, 96, 96))
        pen.line((0, i * down, body.width, i * down), fill=(96, 96, 96))
    for row, texts in enumerate(words):
        for column, text in enumerate(map(printable, texts)):
            fonts = [font_for(text, size) for size in (16, 14, 12, 10)]
            font = next((font for font in fonts if font.getlength(text) <= across - 4), fonts[-1])
            middle = ((column + 0.5) * across, (row + 0.5) * down)
            pen.text(middle, cut_to_width(text, font, across - 4), font=font, fill="white", anchor="mm")
    return _titled(body, title, extremes(values))


def table(
    words: Sequence[Sequence[str]], values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str
) -> Image.Image:
    """Words in rows and columns, each on the colour of its value in 0..1, with a name for every row and column."""
    across, down = _CELL
    body = Image.new("RGB", ((len(columns) + 1) * across, (len(rows) + 1) * down), _PAPER)
    pen, font = ImageDraw.Draw(body), font_for("", 13)

    def write(row: int, column: int, text: str, ink: tuple[int, int, int]) -> None:
        text = printable(text)
        suited = font_for(text, 13)
        corner = (column * across + 4, (row + 0.5) * down)
        pen.text(corner, cut_to_width(text, suited, across - 8), font=suited, fill=ink, anchor="lm")

    for i, name in enumerate(columns):
        pen.text(((i + 1) * across + 4, down / 2), name, font=font, fill=_FAINT, anchor="lm")
    for i, (name, texts, row) in enumerate(zip(rows, words, colors(values), strict=True), start=1):
        write(i, 0, name, _INK)
        for j, (text, color) in enumerate(zip(texts, row.tolist(), strict=True), start=1):
            corner = (j * across, i * down)
            pen.rectangle((*corner, corner[0] + across - 2, corner[1] + down - 2), fill=tuple(color))
            write(i, j, text, _PAPER if np.dot(color, _LIGHT) < 110 else _INK)
    return _titled(body, title, (0.0, 1.0))


def embeddings(values: np.ndarray, title: str) -> Image.Image:
    """Embeddings [N, D] or [I, N, D] as they are, a row per token, images below each other.

    Colours saturate at half a percent of the values at either end, so that outliers do not hide the rest. Where there
    are more rows or columns than pixels, neighbours are averaged.
    """
    stack = values.astype(np.float32).reshape(-1, *values.shape[-2:])
    finite = stack[np.isfinite(stack)]
    bounds = tuple(np.percentile(finite, (_CUT, 100 - _CUT)).tolist()) if finite.size else (0.0, 0.0)
    width, height = (_enlarged(size, most) for size, most in zip(stack.shape[:0:-1], _MOST_PIXELS, strict=True))
    body = Image.new("RGB", (width, len(stack) * (height + _GAP) - _GAP), _PAPER)
    for i, item in enumerate(stack):
        numbers = Image.fromarray(scaled(item, bounds).astype(np.float32))
        shown = numbers.resize((width, height), Image.Resampling.BOX)  # copies, where the factor is an integer
        body.paste(Image.fromarray(colors(np.asarray(shown))), (0, i * (height + _GAP)))
    rows, columns = stack.shape[1:]
    return _titled(body, f"{title}: {rows} tokens downwards, {columns} dimensions across", bounds)


def displayed(image: Image.Image, least: int = _SIDES[0]) -> Image.Image:
    """The image in a size to look at: its longer side is at least `least`, and not far above."""
    return _sized(image, min(max(max(image.size), least), max(least, _SIDES[1])))


def printable(text: str) -> str:
    """A token's text on one line; line breaks, blanks and the empty text get a visible sign."""
    shown = "".join(c if c.isprintable() else "\\n" if c == "\n" else "?" for c in text).strip()
    return shown or ("_" if text else "-")


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def _sized(image: Image.Image, longer: int) -> Image.Image:
    """The image with a longer side of so many pixels; the other one has at least an eighth of them."""
    ratio = longer / max(image.size)
    size = tuple(max(longer // 8, round(side * ratio)) for side in image.size)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _enlarged(size: int, most: int) -> int:
    """Pixels for so many rows or columns: as many for each where there is room."""
    return size * (most // size) if size <= most else most


def _titled(body: Image.Image, title: str, bounds: Bounds | None = None) -> Image.Image:
    """An image on a page with a title, and below it a colour bar from the lowest to the highest value."""
    width = max(body.width, _LEAST_WIDTH)
    font = font_for(title, 16)
    line = sum(font.getmetrics()) + 4
    lines = _wrapped(title, font, width)
    top = _GAP + len(lines) * line + 4
    foot = 44 if bounds else _GAP
    page = Image.new("RGB", (width + 2 * _GAP, top + body.height + foot), _PAPER)
    pen = ImageDraw.Draw(page)
    for i, text in enumerate(lines):
        pen.text((_GAP, _GAP + i * line), text, font=font, fill=_INK)
    page.paste(body, ((page.width - body.width) // 2, top))
    if bounds:
        bar = colors(np.linspace(0, 1, width)[None].repeat(12, axis=0))
        page.paste(Image.fromarray(bar), (_GAP, page.height - 36))
        small = font_for("", 13)
        for value, x, anchor in zip(bounds, (_GAP, _GAP + width), ("la", "ra"), strict=True):
            pen.text((x, page.height - 22), number(value), font=small, fill=_FAINT, anchor=anchor)
    return page


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    """A text in at most three lines of `width` pixels, broken between words; what is too long is cut off."""
    lines = [""]
    for word in printable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width or len(lines) == 3:
            lines[-1] = longer
        else:
            lines.append(word)
    return [cut_to_width(line, font, width) for line in lines]
