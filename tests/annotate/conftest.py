"""Pictures on disk, some of them broken, and an annotator without a model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.annotate import rows as records
from paligemma_jax.annotate.sources import Source
from paligemma_jax.annotate.worker import Picture, read_picture
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.tasks.output import Output, Timing
from paligemma_jax.tasks.prompts import read_prompt

PROMPTS = tuple(map(read_prompt, ("caption en", "detect star")))


def draw(folder: Path, count: int, broken: Sequence[int] = ()) -> Path:
    """A folder of small pictures, each of its own colour; those that are broken hold less than half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (8 + i % 3, 6), (i % 256, i // 256, 7)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:40] + f"{i}".encode())
    return folder


def output(text: str) -> Output:
    """An answer that says a text."""
    none = np.zeros(0, np.float32)
    return Output(text, np.zeros(3, np.int32), none, "eos", Timing(0.0, 0.0, None, 3), none, none)


class Fake:
    """Says how large a picture is and what its bytes are; `asked` are the names of each call."""

    settings = ImageSettings(4)

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    @property
    def names(self) -> list[str]:
        """All that was asked about."""
        return [name for call in self.asked for name in call]

    def read(self, source: Source) -> Picture:
        return read_picture(source, self.settings)

    def answer(self, pictures: Sequence[Picture]) -> None:
        self.asked.append([picture.name for picture in pictures])

    def rows(self, pictures: Sequence[Picture], answers: None) -> list[list[records.Row]]:
        return [[self._row(picture, prompt) for prompt in PROMPTS] for picture in pictures]

    def _row(self, picture: Picture, prompt) -> records.Row:
        key = records.key_of(picture.content, picture.name, prompt.text)
        origin = {"model": "fake", "run_id": "0"}
        if picture.error:
            return records.failed(key, picture.name, picture.size, prompt, picture.error) | origin
        said = output(f"{picture.size} {hashlib.sha256(picture.image.tobytes()).hexdigest()[:6]}")
        return records.answered(key, picture.name, picture.size, prompt, said, []) | origin
