"""Answers as HTML: words in the colours of their boxes, a table of objects, numbers. Everything foreign is escaped."""

import html
import re
from collections.abc import Iterable, Sequence

import numpy as np

from paligemma_jax.serving.events import Finished
from paligemma_jax.tasks.classes import UNNAMED
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.draw import label_color

_TOKENS = re.compile(r"(?:<(?:loc|seg)\d*>?\s*)+")
_NUMBER = re.compile(r"<(loc|seg)(\d+)>")
_ENDS = {"eos": "complete", "stop": "complete", "length": "cut off at the longest length"}


def escape(text: object) -> str:
    """A text for HTML, and for templates that know braces and dollars."""
    return html.escape(str(text)).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def answer_markup(text: str, objects: Sequence[Detection] = ()) -> str:
    """An answer with its labels in the colours of their boxes, and its locations and codes made short."""
    spans = sorted((item.span, item.label) for item in objects if item.span is not None)
    parts, end = [], 0
    for (start, stop), label in spans:
        if start < end:
            continue
        parts += [_shortened(text[end:start]), _shortened(text[start:stop], label)]
        end = stop
    return "".join([*parts, _shortened(text[end:])])


def table_markup(objects: Sequence[Detection]) -> str:
    """Objects with scores and boxes in pixels; "" without any."""
    if not objects:
        return ""
    has_masks = any(item.mask is not None for item in objects)
    heads = ["object", "score", "x", "y", "width", "height", *(["mask pixels"] if has_masks else [])]
    rows = []
    for item in objects:
        x0, y0, x1, y1 = item.box
        cells = ["–" if item.score is None else f"{item.score:.2f}", *(round(v) for v in (x0, y0, x1 - x0, y1 - y0))]
        if has_masks:
            cells.append("–" if item.mask is None else int(np.count_nonzero(item.mask)))
        name = f'<i style="background:{_css(item.label)}"></i>{escape(item.label or UNNAMED)}'
        rows.append(f"<tr><th scope=row>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    return f'<div class="pj-table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def numbers_markup(finished: Finished) -> str:
    """How long an answer is and took."""
    count, rest = len(finished.output.tokens), finished.total_s - finished.first_token_s
    count = count or finished.output.timing.new_tokens
    values = [
        ("first token", f"{finished.first_token_s:.2f} s"),
        ("speed", f"{(count - 1) / rest:.0f} tokens/s" if count > 1 and rest > 0 else "–"),
        ("length", f"{count} token{'s' * (count != 1)}"),
        ("end", _ENDS[finished.reason]),
    ]
    return _list("pj-numbers", (f"<span>{name}</span> {escape(value)}" for name, value in values))


def notes_markup(notes: Sequence[str], kind: str = "note") -> str:
    """Lines about an answer, or about what went wrong; "" for none."""
    return _list(f"pj-notes pj-{kind}", map(escape, notes)) if notes else ""


def _list(name: str, items: Iterable[str]) -> str:
    return f'<ul class="{name}">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _shortened(text: str, label: str | None = None) -> str:
    """Text with tokens as small marks; the words have the colour of a label, if there is one."""
    parts, end = [], 0
    for tokens in _TOKENS.finditer(text):
        parts += [_words(text[end : tokens.start()], label), _mark(tokens[0])]
        end = tokens.end()
    return "".join([*parts, _words(text[end:], label)])


def _words(text: str, label: str | None) -> str:
    if label is None or not text.strip():
        return escape(text)
    inner, lead = text.strip(), len(text) - len(text.lstrip())
    mark = f'<mark style="--label:{_css(label)}">{escape(inner)}</mark>'
    return text[:lead] + mark + text[lead + len(inner) :]


def _mark(tokens: str) -> str:
    found = _NUMBER.findall(tokens)
    locs = " ".join(str(int(number)) for kind, number in found if kind == "loc")
    codes = sum(kind == "seg" for kind, _ in found)
    shown = " + ".join(filter(None, [locs, f"{codes} mask code{'s' * (codes != 1)}" if codes else ""]))
    return f'<span class="pj-tokens" title="{escape(tokens.strip())}">{shown or "…"}</span> '


def _css(label: str) -> str:
    return "#{:02x}{:02x}{:02x}".format(*label_color(label))
