"""What is shipped: small enough, whole, and able to answer."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax import patch_vit
from paligemma_jax.shapes_world.patch_evaluation import evaluate

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@pytest.fixture(scope="module")
def model():
    return pj.load(ASSETS / "tiny", dtype="float32")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_shipped_files_are_small():
    assert size_of(ASSETS) - size_of(ASSETS / "patch_vit") <= 12_000_000
    assert size_of(ASSETS / "patch_vit") <= 6_000_000


@pytest.fixture(scope="module")
def outputs(model) -> list[pj.Output]:
    """Answers about two pictures, in one batch."""
    prompts = ["caption en", "answer en what color is the star?", "detect red triangle", "segment star"]
    pictures = [ASSETS / "examples" / f"{name}.png" for name in ("shapes", "shapes", "shapes", "stars")]
    return model.generate(pictures, prompts)


def test_the_shipped_model_speaks_about_what_it_sees(outputs):
    caption, color, absent, _ = (output.text for output in outputs)
    assert all(word in caption for word in ("circle", "square", "star"))
    assert color == "blue" and absent == ""


def test_masks_of_the_shipped_model_lie_in_their_boxes(model, outputs):
    with Image.open(ASSETS / "examples" / "stars.png") as picture:
        things, _ = model.objects(outputs[-1], picture.size)
    assert [thing.label for thing in things] == ["star"] * 2
    for thing in things:
        rows, columns = np.nonzero(thing.mask)
        x0, y0, x1, y1 = thing.box
        assert x0 - 1 <= columns.min() and columns.max() <= x1 and y0 - 1 <= rows.min() and rows.max() <= y1
        assert 0.2 < thing.mask.sum() / ((x1 - x0) * (y1 - y0)) < 0.6  # a star fills about a third of its box


@pytest.fixture(scope="module")
def pair() -> tuple[patch_vit.Student, patch_vit.Clip]:
    return patch_vit.load(ASSETS / "patch_vit" / "student"), patch_vit.load_clip(ASSETS / "patch_vit" / "teacher")


def test_the_shipped_patch_vit_finds_scenes_and_shapes(pair):
    """Far above chance; the numbers on 500 scenes are in benchmarks/results/patch_vit.md."""
    patch_vit.check_pair(*pair)
    found = evaluate(*pair, num_scenes=25)
    assert found["student"]["recall_1"] > 5 * found["chance"]["recall_1"] and found["teacher"]["recall_1"] > 0.8
    assert found["student"]["inside"] > 5 * found["chance"]["inside"]
    assert found["student"]["pointing"] > 1.3 * found["training_free"]["pointing"]
