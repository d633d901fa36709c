"""Maps drawn over pictures: overlays, labelled rows of them, films, and grids of found pictures.

Axes: R and C rows and columns of a map, H and W in pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.errors import DataError
from paligemma_jax.files import replacing
from paligemma_jax.processing.decode import to_rgb, upright
from paligemma_jax.tasks.draw import cut_to_width, font_for, on_one_line

PANEL = 224  # side of a panel in pixels
BAR = 20  # height of a bar with labels

_SECOND = 1000  # milliseconds that a phrase is shown
_LONGEST = 448  # longer side of a film's frames at most
_FONT_SIZES = (13, 12, 11, 10)
_GAP = 6
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (228, 229, 232)
_MULTIPLIED = ("L", "LA", "RGB", "RGBA", "I", "F")  # modes that stay; pictures of others become RGB


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """A picture whose patches are as bright as their values: unchanged where a map is highest, black where it is 0.

    Args:
      image: any size and mode; it is turned upright as its EXIF data says.
      values: [R, C], at least 0, with a positive one; the map lies over the whole of the picture.

    Returns:
      A new picture of the same size (upright), and mode if that is grey or RGB, of 8 or more bits, with or without
      transparency, which stays as it is; else RGB.

    Raises:
      DataError: a map without a positive value, or with one that is no number.
    """
    highest = np.max(values)
    if not (highest > 0 and np.isfinite(highest) and np.min(values) >= 0):
        raise DataError("a map to lay over a picture has values of at least 0 and a positive one: give such a map")
    keeps_mode = image.mode in _MULTIPLIED or image.mode.startswith("I;16")
    image = upright(image) if keeps_mode else to_rgb(image, "the picture")
    rows, columns = (
        ((np.arange(length) + 0.5) * cells / length).astype(int)
        for length, cells in zip(reversed(image.size), np.shape(values), strict=True)
    )
    factor = (np.asarray(values, np.float64) / highest)[rows[:, None], columns]
    pixels = np.array(image)
    colours = pixels[..., : len(image.getbands()) - image.mode.endswith("A")] if pixels.ndim == 3 else pixels[..., None]
    darkened = colours * factor[..., None]
    colours[...] = darkened if image.mode == "F" else np.rint(darkened)
    return Image.fromarray(pixels)


def strip(image: Image.Image, maps: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
    """Overlays [224, 224] of maps side by side, each over its label in a bar: [244, n * 224]."""
    small = panel(image)
    return labelled([overlay(small, values) for values in maps], labels)


def panel(image: Image.Image) -> Image.Image:
    """A picture squeezed to a panel, as the model sees it."""
    return to_rgb(image, "the picture").resize((PANEL, PANEL), Image.Resampling.BILINEAR)


def labelled(panels: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Panels of one height side by side, and a bar with their labels below them."""
    row = Image.new("RGB", (sum(item.width for item in panels), panels[0].height + BAR), _PAPER)
    left = 0
    for item, text in zip(panels, labels, strict=True):
        row.paste(item, (left, 0))
        row.paste(bar(text, item.width), (left, item.height))
        left += item.width
    return row


def bar(text: str, width: int, paper: tuple[int, int, int] = _PAPER) -> Image.Image:
    """A bar with a text in its middle, in smaller letters and then cut where it is too long."""
    image = Image.new("RGB", (width, BAR), paper)
    text = on_one_line(text)
    fonts = [font_for(text, size) for size in _FONT_SIZES]
    font = next((font for font in fonts if font.getlength(text) <= width - _GAP), fonts[-1])
    text = cut_to_width(text, font, width - _GAP)
    ImageDraw.Draw(image).text((width / 2, BAR / 2), text, font=font, fill=_INK, anchor="mm")
    return image


def film(image: Image.Image, maps: Sequence[np.ndarray], labels: Sequence[str]) -> list[Image.Image]:
    """Frames for `save_film`: the overlay of each map in the picture's shape, with its label below."""
    image = to_rgb(image, "the picture")
    share = min(1, _LONGEST / max(image.size))
    size = tuple(max(round(length * share), 1) for length in image.size)
    size = (max(size[0], _LONGEST // 4), size[1])  # room for a label
    small = image.resize(size, Image.Resampling.BILINEAR)
    return [labelled([overlay(small, values)], [text]) for values, text in zip(maps, labels, strict=True)]


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_film(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as a GIF that shows each for a second, over and over; whole or not at all."""
    few = [frame.quantize(256, Image.Quantize.MEDIANCUT) for frame in frames]  # a palette for each
    with replacing(path) as temporary:
        few[0].save(temporary, "GIF", save_all=True, append_images=few[1:], duration=_SECOND, loop=0, disposal=1)


def found_grid(rows: Sequence[tuple[str, Sequence[tuple[Image.Image | None, str]]]], title: str) -> Image.Image:
    """Found pictures under a title, for each row its name and the pictures with their captions, best first.

    A picture that is None, as it could not be read again, is an empty panel.
    """
    width = PANEL * max(len(found) for _, found in rows)
    height = BAR + sum(PANEL + 2 * BAR for _ in rows)
    page = Image.new("RGB", (width, height), _PAPER)
    page.paste(bar(title, width), (0, 0))
    top = BAR
    for name, found in rows:
        page.paste(bar(name, width, _FAINT), (0, top))
        page.paste(labelled([_framed(image) for image, _ in found], [text for _, text in found]), (0, top + BAR))
        top += PANEL + 2 * BAR
    return page


def _framed(image: Image.Image | None) -> Image.Image:
    """A whole picture in the middle of a panel, in a thin frame."""
    page = Image.new("RGB", (PANEL, PANEL), _PAPER)
    if image is None:
        return page
    share = (PANEL - 2 * _GAP) / max(image.size)
    small = image.resize([max(round(length * share), 1) for length in image.size], Image.Resampling.BILINEAR)
    left, top = (PANEL - small.width) // 2, (PANEL - small.height) // 2
    page.paste(small, (left, top))
    frame = (left - 1, top - 1, left + small.width, top + small.height)
    ImageDraw.Draw(page).rectangle(frame, outline=_FAINT)
    return page
