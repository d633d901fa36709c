"""Answers to held-out examples, to be looked at."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence

from PIL import Image

from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.draw import draw

_SIDE = 320  # pixels of a picture on a page

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:1rem}} figure{{display:inline-block;vertical-align:top;width:{side}px;
margin:.5rem}} img{{max-width:100%}} dt{{color:#666;font-size:.8rem}} dd{{margin:0 0 .4rem;overflow-wrap:anywhere}}
.same dd.answer{{color:#070}} .other dd.answer{{color:#a00}}</style></head><body><h1>{title}</h1>
{figures}
</body></html>
"""
_FIGURE = """<figure class="{kind}"><img alt="" src="data:image/png;base64,{picture}">
<dl><dt>prompt</dt><dd>{prompt}</dd>
<dt>expected</dt><dd>{expected}</dd><dt>answer</dt><dd class="answer">{answer}</dd></dl></figure>"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out example and its answer.

    picture: the first one of the example.
    objects: of the answer, in pixels of the picture.
    """

    picture: Image.Image
    prompt: str
    expected: str
    answer: str
    objects: Sequence[Detection] = ()

    def drawn(self) -> Image.Image:
        """The picture, made small, with the objects of the answer on it."""
        picture = draw(self.picture, self.objects)
        picture.thumbnail((_SIDE, _SIDE))
        return picture

    def text(self) -> str:
        return f"{self.prompt} → {self.answer} (expected: {self.expected})"


def to_html(title: str, samples: Sequence[Sample]) -> str:
    """A page that needs no other file."""
    return _PAGE.format(title=html.escape(title), side=_SIDE, figures="\n".join(map(_figure, samples)))


def _figure(sample: Sample) -> str:
    file = io.BytesIO()
    sample.drawn().save(file, "PNG")
    texts = {name: html.escape(getattr(sample, name)) or "(empty)" for name in ("prompt", "expected", "answer")}
    kind = "same" if sample.answer.strip() == sample.expected.strip() else "other"
    return _FIGURE.format(kind=kind, picture=base64.b64encode(file.getvalue()).decode(), **texts)
