"""Examples as a model is trained on them: the picture with its objects, and the tokens coloured by their role."""

import dataclasses
import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.files import replacing, write_text
from paligemma_jax.processing.processor import Processor
from paligemma_jax.tasks.detection import parse
from paligemma_jax.tasks.draw import Color, draw, font_for, on_one_line
from paligemma_jax.tasks.prompts import read_prompt
from paligemma_jax.tasks.segmentation import attach_masks

ROLES: dict[str, tuple[Color, str]] = {  # colour, and what it means
    "picture": ((176, 196, 222), "seen in both directions, not supervised"),
    "prefix": ((152, 216, 170), "seen in both directions, not supervised"),
    "suffix": ((255, 202, 112), "seen from before only, supervised"),
    "padding": ((224, 224, 224), "seen by nobody, not supervised"),
}
_SIDE = 512  # pixels of the longer side of a drawn picture
_LETTER = 15.0


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example as it is trained on: pictures after augmentation, texts, and where it is written."""

    images: Sequence[Image.Image]
    prefix: str
    suffix: str
    where: str


def tokens_by_role(shown: Shown, processor: Processor, num_tokens: int) -> list[tuple[str, str]]:
    """Role and text of each token of a row padded to `num_tokens`; those of pictures and padding are one item each."""
    row = processor.layout([list(range(len(shown.images)))], shown.prefix, shown.suffix, pad_to=num_tokens)
    num_pictures = int((row.image_slots[0] >= 0).sum())
    prefix_length, length = int(row.prefix_length[0]), int(row.length[0])
    name = processor.tokenizer.name
    words = [(i, name(id_) or f"<{id_}>") for i, id_ in enumerate(row.tokens[0].tolist())]
    found = [("picture", f"<image> x {num_pictures}")]
    found += [("prefix" if i < prefix_length else "suffix", word) for i, word in words[num_pictures:length]]
    if length < num_tokens:
        found.append(("padding", f"<pad> x {num_tokens - length}"))
    return found


def drawn(shown: Shown, decode: Callable[[np.ndarray], np.ndarray] | None) -> Image.Image:
    """The pictures of an example side by side, objects on the only one; masks need `decode`."""
    scaled = []
    for image in shown.images:
        scale = _SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size)
        if len(shown.images) == 1:
            found, _ = parse(shown.suffix, size, labels=read_prompt(shown.prefix).labels)
            if decode is not None:
                found = attach_masks(found, size, decode)
            image = draw(image, found)
        scaled.append(image)
    sheet = Image.new("RGB", (sum(image.width for image in scaled), max(image.height for image in scaled)), "white")
    left = 0
    for image in scaled:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


def with_tokens(picture: Image.Image, tokens: Sequence[tuple[str, str]]) -> Image.Image:
    """A picture over its tokens, each on the colour of its role."""
    width = max(picture.width, _SIDE)
    font = font_for("".join(word for _, word in tokens), _LETTER)
    line = sum(font.getmetrics()) + 4
    boxes: list[tuple[int, int, int, str, str]] = []
    x = y = 0
    for role, word in tokens:
        word = on_one_line(_visible(word)) or "_"
        wide = round(font.getlength(word)) + 8
        if x and x + wide > width:
            x, y = 0, y + line
        boxes.append((x, y, wide, role, word))
        x += wide + 1
    sheet = Image.new("RGB", (width, picture.height + y + line + 4), "white")
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for x, y, wide, role, word in boxes:
        top = picture.height + 4 + y
        pen.rectangle((x, top, x + wide - 1, top + line - 2), fill=ROLES[role][0])
        pen.text((x + 4, top), word, font=font, fill="black")
    return sheet


def write_preview(
    directory: Path,
    examples: Iterator[Shown],
    processor: Processor,
    num_tokens: Callable[[Shown], int],
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[Path]:
    """Write `example_000.png` and so on, and `index.html` with all of them; their paths, the page's last.

    Args:
      num_tokens: what the row of an example is padded to.
      decode: mask codes to masks; without it only boxes are drawn.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files, parts = [], []
    for shown in examples:
        tokens = tokens_by_role(shown, processor, num_tokens(shown))
        files.append(directory / f"example_{len(files):03}.png")
        with replacing(files[-1]) as temporary:
            with_tokens(drawn(shown, decode), tokens).save(temporary, format="PNG")
        parts.append(_part(shown, tokens, files[-1].name))
    files.append(directory / "index.html")
    write_text(files[-1], _PAGE.format(style=_style(), legend=_legend(), parts="\n".join(parts)))
    return files


def _visible(word: str) -> str:
    return word.replace("\n", "\\n")


def _part(shown: Shown, tokens: Sequence[tuple[str, str]], name: str) -> str:
    words = "".join(f'<span class="{role}">{html.escape(_visible(word))}</span> ' for role, word in tokens)
    texts = f"<p><b>{html.escape(shown.prefix)}</b></p><p>{html.escape(shown.suffix) or '(empty)'}</p>"
    return f'<section><h2>{html.escape(shown.where)}</h2><img src="{name}" alt="">{texts}<p>{words}</p></section>'


def _style() -> str:
    return "\n".join(f".{role} {{ background: rgb{color} }}" for role, (color, _) in ROLES.items())


def _legend() -> str:
    return " ".join(f'<span class="{role}">{role}: {meaning}</span>' for role, (_, meaning) in ROLES.items())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Examples</title><style>
body {{ font: 15px sans-serif; max-width: 60em; margin: 2em auto }}
span {{ padding: 1px 3px; font-family: monospace; white-space: pre }}
img {{ max-width: 100% }}
{style}
</style></head><body><h1>Examples</h1><p>{legend}</p>
{parts}
</body></html>
"""
