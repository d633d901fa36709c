"""What an answer points at, for the report: its boxes and masks over the picture, and what its locations mean."""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.inspection.words import Word
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.draw import label_color

_EDGES = ("top", "left", "bottom", "right")  # in the order of an answer's locations
_LOCATION = re.compile(r"<loc(\d{4})>", re.ASCII)
_MASK_SIDE = 512  # pixels of the longer side of a mask, enough to look at
_OPACITY = 0.45


def objects_layer(objects: Sequence[Detection], size: tuple[int, int]) -> str:
    """The objects as an SVG element that covers the picture; empty without any.

    Args:
      objects: boxes in pixels; masks, where present, of the picture's size.
      size: (width, height) of the picture in pixels.
    """
    if not objects:
        return ""
    width, height = size
    unit = (width * height) ** 0.5 / 100
    parts = [_mask(item.mask, item.label, size) for item in objects if item.mask is not None]
    for item in objects:
        x0, y0, x1, y1 = item.box
        color, label = _css(item.label), html.escape(item.label)
        at = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        parts.append(f'<rect {at} fill="none" stroke="{color}" stroke-width="{unit:.2f}"><title>{label}</title></rect>')
        top = max(y0 - unit, 4 * unit)
        text = f'<text x="{x0:.1f}" y="{top:.1f}" font-size="{4 * unit:.1f}" fill="{color}" stroke="#000"'
        parts.append(f'{text} stroke-width="{unit:.2f}" paint-order="stroke">{label}</text>')
    box = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none"'
    return f'<svg id="objects" {box} role="img" aria-label="Boxes and masks of the answer">{"".join(parts)}</svg>'


def locations(words: Sequence[Word], size: tuple[int, int], loc_scale: int = 1023) -> list[dict[str, Any] | None]:
    """What each word means that is a location: `text` in words, `edge` (0 top to 3 right) and `share` of the side.

    Locations that follow each other are boxes of four: top, left, bottom, right. Other words have None.

    Args:
      words: of an answer, in order.
      size: (width, height) of the picture in pixels.
      loc_scale: the location that means the far edge.
    """
    meanings, place = [], 0
    for word in words:
        found = _LOCATION.fullmatch(word.text)
        if not found:
            meanings.append(None)
            place = 0
            continue
        edge, share = place % 4, int(found[1]) / loc_scale
        side, axis = (size[1], "y") if edge % 2 == 0 else (size[0], "x")
        text = f"{_EDGES[edge]} edge of a box: {int(found[1])} of {loc_scale}, {axis} = {share * side:.0f} px"
        meanings.append({"text": text, "edge": edge, "share": round(share, 4)})
        place += 1
    return meanings


def _mask(mask: np.ndarray, label: str, size: tuple[int, int]) -> str:
    """A mask as a picture in the colour of its label, clear elsewhere."""
    shown = Image.fromarray(mask.astype(np.uint8) * round(255 * _OPACITY))
    shown.thumbnail((_MASK_SIDE, _MASK_SIDE))
    tinted = Image.new("RGBA", shown.size, (*label_color(label), 0))
    tinted.putalpha(shown)
    file = io.BytesIO()
    tinted.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    place = f'width="{size[0]}" height="{size[1]}" preserveAspectRatio="none"'
    return f'<image {place} href="data:image/png;base64,{data}"/>'


def _css(label: str) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in label_color(label))
