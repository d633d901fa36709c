"""Pictures of one grey, and lines about them."""

import json

import pytest
from PIL import Image

from paligemma_jax.training.data import Data, open_data


@pytest.fixture
def folder(tmp_path):
    """Pictures 0.png to 5.png, each of one grey."""
    for i in range(6):
        Image.new("RGB", (9, 5), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def write(folder):
    """write(*lines): the path of data.jsonl with these lines, which are texts or objects."""

    def write(*lines):
        file = folder / "data.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def opened(write):
    """opened(*lines): the examples of these lines."""

    def open_lines(*lines) -> Data:
        return open_data(write(*lines))

    return open_lines
