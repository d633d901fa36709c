"""What a visitor asked during the visit; of this visitor alone, and kept nowhere."""

import base64
import dataclasses
import io

from PIL import Image

from paligemma_jax.serving.web.markup import escape

MOST = 30  # entries
_SIDE = 96  # of thumbnails, in pixels


@dataclasses.dataclass(frozen=True)
class Entry:
    """A question and its answer.

    thumbnail: data URI.
    answer: markup.
    """

    thumbnail: str
    prompt: str
    answer: str


def add(entries: tuple[Entry, ...], picture: Image.Image, prompt: str, answer: str) -> tuple[Entry, ...]:
    """The entries with one more, the latest first; the oldest are forgotten."""
    return (Entry(thumbnail(picture), prompt, answer), *entries)[:MOST]


def thumbnail(picture: Image.Image) -> str:
    """A small JPEG of a picture, as a data URI."""
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def history_markup(entries: tuple[Entry, ...]) -> str:
    """The entries as a list, the latest first."""
    if not entries:
        return '<p class="pj-empty">What you ask appears here until you close the page.</p>'
    items = (
        f'<li><img src="{entry.thumbnail}" alt=""><div><code>{escape(entry.prompt)}</code>'
        f'<div class="pj-answer">{entry.answer}</div></div></li>'
        for entry in entries
    )
    return f'<ol class="pj-history">{"".join(items)}</ol>'
