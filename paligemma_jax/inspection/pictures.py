"""Maps as pictures: a colour map, maps laid over the picture, sheets of many, words on patches, tables of words, and
raw embeddings.

Axes: G patches of a side, M maps, I pictures, N tokens, D width, H and W in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.tasks.draw import Font, font_for

Bounds = tuple[float, float]

# Nine points of matplotlib's inferno (CC0): from dark to bright in steps that look even, in grey too.
INFERNO = ("#000004", "#210c4a", "#57106e", "#8a226a", "#bc3754", "#e45a31", "#f98e09", "#f9cb35", "#fcffa4")
_POINTS = np.array([list(bytes.fromhex(color[1:])) for color in INFERNO], np.float32)

_OPACITY = (0.45, 0.75)  # of a map where it is lowest and highest
_GREY = 0.6  # how much of the picture's colour is taken out under a map
_SIDES = (512, 1024)  # a picture is made larger or smaller so that its longer side lies between
_THUMBNAIL = 200  # longer side of a picture on a sheet
_PATCH = 72  # pixels that a word has room in
_LARGEST = 2048  # side of a picture with words on it
_MOST_PIXELS = (1200, 900)  # width and height that embeddings are enlarged to at most
_CUT = 0.5  # percent of the embeddings' numbers at either end that share the last colour
_CELL = (92, 22)  # pixels of a table's cell
_GAP = 10
_LEAST_WIDTH = 320
_LIGHT = (0.2126, 0.7152, 0.0722)  # how much each colour adds to what the eye takes for brightness
_INK, _FAINT, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)


def colors(values: np.ndarray) -> np.ndarray:
    """Values [...] in 0..1 to colours uint8 [..., 3]; what is not a number becomes grey."""
    place = np.clip(np.nan_to_num(values, nan=0.0), 0, 1) * (len(_POINTS) - 1)
    low = np.minimum(place.astype(int), len(_POINTS) - 2)
    share = (place - low)[..., None]
    mixed = np.round(_POINTS[low] * (1 - share) + _POINTS[low + 1] * share).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], np.uint8(128), mixed)


def extremes(values: np.ndarray) -> Bounds:
    """Smallest and largest number; zeros if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def scaled(values: np.ndarray, bounds: Bounds | None = None) -> np.ndarray:
    """Values to 0..1, from `bounds` or from the smallest and largest; all zeros where these are the same."""
    low, high = bounds or extremes(values)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def overlay(picture: Image.Image, values: np.ndarray, bounds: Bounds | None = None) -> Image.Image:
    """A map [G, G] as a translucent layer over the whole of a picture, whose size stays and whose colours fade."""
    smooth = Image.fromarray(scaled(values, bounds).astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(smooth), 0, 1)
    opacity = (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * np.nan_to_num(share))[..., None]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    faded = _GREY * grey + (1 - _GREY) * np.asarray(picture.convert("RGB"), np.float32)
    return Image.fromarray(((1 - opacity) * faded + opacity * colors(share)).round().astype(np.uint8))


def heat_map(picture: Image.Image, values: np.ndarray, title: str) -> Image.Image:
    """A map [G, G] over a picture, with a title and a bar that says what the colours mean."""
    return _titled(overlay(displayed(picture), values), title, extremes(values))


def sheet(
    picture: Image.Image,
    values: np.ndarray,
    captions: Sequence[str],
    title: str,
    columns: int | None = None,
    shared: bool = False,
) -> Image.Image:
    """Many maps [M, G, G] over one picture, each with its caption.

    Args:
      columns: maps in a row; None makes the sheet a little wider than high.
      shared: one scale of colours for all maps, else each has its own.
    """
    small = _sized(picture, _THUMBNAIL)
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
        pen.text((x, y), _shortened(text, font, across - _GAP), font=font, fill=_INK)
        body.paste(overlay(small, item, bounds), (x, y + head))
    return _titled(body, title, bounds)


def worded(picture: Image.Image, words: Sequence[Sequence[str]], values: np.ndarray, title: str) -> Image.Image:
    """A word on every patch of a picture, [G, G] of them, over a map [G, G], such as how sure each is."""
    side = len(words)
    least = min(_LARGEST, _PATCH * side * max(picture.size) // min(picture.size))
    base = np.asarray(overlay(displayed(picture, least), values), np.float32)
    image = Image.fromarray((0.5 * base).astype(np.uint8))  # dark enough for white letters
    pen = ImageDraw.Draw(image)
    across, down = image.width / side, image.height / side
    for i in range(1, side):
        pen.line((i * across, 0, i * across, image.height), fill=(96, 96, 96))
        pen.line((0, i * down, image.width, i * down), fill=(96, 96, 96))
    for row, texts in enumerate(words):
        for column, text in enumerate(map(printable, texts)):
            fonts = [font_for(text, size) for size in (16, 14, 12, 10)]
            font = next((font for font in fonts if font.getlength(text) <= across - 4), fonts[-1])
            middle = ((column + 0.5) * across, (row + 0.5) * down)
            pen.text(middle, _shortened(text, font, across - 4), font=font, fill="white", anchor="mm")
    return _titled(image, title, extremes(values))


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
        place = (column * across + 4, (row + 0.5) * down)
        pen.text(place, _shortened(text, suited, across - 8), font=suited, fill=ink, anchor="lm")

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
    """Embeddings [N, D] or [I, N, D] as they are, a row per token, pictures below each other.

    Half a percent of the numbers at either end share a colour, lest a few large ones make all others alike. Where
    there are more rows or columns than pixels, neighbours are averaged.
    """
    stack = values.astype(np.float32).reshape(-1, *values.shape[-2:])
    finite = stack[np.isfinite(stack)]
    bounds = tuple(np.percentile(finite, (_CUT, 100 - _CUT)).tolist()) if finite.size else (0.0, 0.0)
    width, height = (_enlarged(size, most) for size, most in zip(stack.shape[:0:-1], _MOST_PIXELS, strict=True))
    body = Image.new("RGB", (width, len(stack) * (height + _GAP) - _GAP), _PAPER)
    for i, item in enumerate(stack):
        numbers = Image.fromarray(scaled(item, bounds).astype(np.float32))
        shown = numbers.resize((width, height), Image.Resampling.BOX)  # of whole-number enlargements, copies
        body.paste(Image.fromarray(colors(np.asarray(shown))), (0, i * (height + _GAP)))
    rows, columns = stack.shape[1:]
    return _titled(body, f"{title}: {rows} tokens downwards, {columns} dimensions across", bounds)


def displayed(picture: Image.Image, least: int = _SIDES[0]) -> Image.Image:
    """The picture in a size to look at: its longer side is at least `least`, and not far above."""
    return _sized(picture, min(max(max(picture.size), least), max(least, _SIDES[1])))


def printable(text: str) -> str:
    """A token's text on one line; line breaks, blanks and nothing at all get a sign that is seen."""
    shown = "".join(c if c.isprintable() else "\\n" if c == "\n" else "?" for c in text).strip()
    return shown or ("_" if text else "-")


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def _sized(picture: Image.Image, longer: int) -> Image.Image:
    """The picture with a longer side of so many pixels; the other one has at least an eighth of them."""
    ratio = longer / max(picture.size)
    size = tuple(max(longer // 8, round(side * ratio)) for side in picture.size)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _enlarged(size: int, most: int) -> int:
    """Pixels for so many rows or columns: as many for each where there is room."""
    return size * (most // size) if size <= most else most


def _titled(body: Image.Image, title: str, bounds: Bounds | None = None) -> Image.Image:
    """A picture on a page with a title, and below it a bar of the colours from the lowest to the highest number."""
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
        for value, place, anchor in zip(bounds, (_GAP, _GAP + width), ("la", "ra"), strict=True):
            pen.text((place, page.height - 22), number(value), font=small, fill=_FAINT, anchor=anchor)
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
    return [_shortened(line, font, width) for line in lines]


def _shortened(text: str, font: Font, width: float) -> str:
    """The text, or as much of it as `width` pixels hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
