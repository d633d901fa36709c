"""What `detect` and `segment` return: objects that know the size of their picture, as it is seen."""

import copy
import io
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.tasks import coco, yolo
from paligemma_jax.tasks.draw import draw, label_color

STAR = "<loc0000><loc0000><loc0512><loc1023> star"  # the upper half
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def model(make_model, monkeypatch):
    """A model that sees a star in the upper half of every picture."""

    def answer(model: pj.PaliGemma, requests: list[pj.Request]) -> list[pj.Output]:
        tokens = np.array([*model.processor.tokenizer.encode(STAR), model.config.eos_token_id])
        even = np.full(len(tokens), 0.5)
        return [pj.Output(STAR, tokens, np.log(even), "eos", pj.Timing(0.0, 1.0, 1.0, 1), even, even)] * len(requests)

    monkeypatch.setattr(pj.PaliGemma, "answer", answer)
    return make_model("gemma2")


def stored(**options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, **options)
    return file.getvalue()


def turned() -> bytes:
    """30 x 20 as stored, 20 x 30 as it is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(format="JPEG", exif=exif)


def test_they_know_the_size_of_the_upright_picture(model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(turned())
    with Image.open(tmp_path / "a.jpg") as opened:
        sources = [tmp_path / "a.jpg", str(tmp_path / "a.jpg"), turned(), io.BytesIO(turned()), opened]
        for source in sources:
            found = model.detect(source, "star")
            assert found.size == (20, 30) and found[0].box[2:] == pytest.approx((20, 30 * 512 / 1023))
    for source in (NOISE, jnp.asarray(NOISE), Image.fromarray(NOISE), stored(format="GIF")):
        assert model.locate("detect", source, "star").size == (30, 20)


def test_each_of_several_has_its_own(model):
    several = model.detect([NOISE, turned(), NOISE[:10]], ["star"], split_classes=True)
    assert [found.size for found in several] == [(30, 20), (20, 30), (30, 10)]
    assert all(isinstance(found, pj.Detections) and len(found) == 1 for found in several)
    nothing = model.detect(NOISE, "star", min_score=1.0)
    assert nothing == [] and nothing.size == (30, 20)


def test_exports_of_them(model):
    found = model.detect(turned(), "star")
    assert yolo.to_yolo(found, found.size, ["star"]) == "0 0.500000 0.250244 1.000000 0.500489\n"
    [annotation] = coco.annotate(found, 1, found.size, ["star"])
    assert annotation["bbox"] == pytest.approx([0, 0, 20, 15.01], abs=0.01)
    assert coco.image(1, "a.jpg", found.size) == {"id": 1, "file_name": "a.jpg", "width": 20, "height": 30}


def test_they_are_drawn_on_the_upright_picture(model):
    """A picture that is opened by PIL alone lies on its side; the box is drawn where it was seen."""
    with Image.open(io.BytesIO(turned())) as opened:
        drawn = draw(opened, model.detect(opened, "star"))
    assert opened.size == (30, 20) and drawn.size == (20, 30)
    edge = np.asarray(drawn)[:, 0]  # of the box in the upper half, and of the picture
    assert (edge[:14] == label_color("star")).all() and not (edge[18:] == label_color("star")).all(axis=1).any()


def test_they_are_lists():
    found = pj.Detections([pj.Detection("star", (0.0, 0.0, 1.0, 1.0))], (3, 2))
    assert found == [pj.Detection("star", (0.0, 0.0, 1.0, 1.0))] and isinstance(found, list)
    for again in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert again == found and again.size == (3, 2)
