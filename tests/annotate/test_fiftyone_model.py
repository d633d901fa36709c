"""The model for FiftyOne. Where FiftyOne is not installed, classes with the constructors of its own stand in for it."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from paligemma_jax import errors
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.tasks.detections import Detections

MODULE = "paligemma_jax.annotate.fiftyone_model"


class Label:
    """Keeps the fields that FiftyOne's labels have, and refuses others."""

    fields: tuple[str, ...] = ()

    def __init__(self, **given):
        assert set(given) <= set(self.fields)
        self.__dict__ |= dict.fromkeys(self.fields) | given


class FoDetection(Label):
    fields = ("label", "bounding_box", "confidence", "mask")


class FoDetections(Label):
    fields = ("detections",)


@pytest.fixture
def module(monkeypatch):
    if importlib.util.find_spec("fiftyone") is None:
        models = types.ModuleType("fiftyone.core.models")
        models.Model = type("Model", (), {})
        stub = types.ModuleType("fiftyone")
        stub.Detection, stub.Detections = FoDetection, FoDetections
        for name, value in (("fiftyone", stub), ("fiftyone.core", types.ModuleType("core")), (models.__name__, models)):
            monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


class Found:
    """A model that finds what it is told, in each picture."""

    def __init__(self, *items):
        self.items, self.asked = items, []

    def mask_decoder(self):
        raise errors.CheckpointError("masks need vae-oid.npz")

    def locate(self, task, images, classes, **options):
        self.asked.append((task, len(images), classes, options))
        return [Detections(self.items, image.shape[1::-1]) for image in images]


def picture(width=80, height=40):
    return np.zeros((height, width, 3), np.uint8)


def test_boxes_are_shares_of_the_picture(module):
    model = Found(Detection("star", (8, 10, 16.5, 20), 0.5), Detection("", (70, 30, 90, 50), None))
    found = module.FiftyOneModel(model, ("star", "moon"), min_score=0.25)
    first, second = found.predict(picture()).detections
    assert (first.label, first.confidence, first.mask) == ("star", 0.5, None)
    assert first.bounding_box == pytest.approx([0.1, 0.25, 0.10625, 0.25])
    assert (second.label, second.confidence) == ("", None)
    assert second.bounding_box == pytest.approx([0.875, 0.75, 0.125, 0.25])  # cut at the edges
    assert model.asked == [("detect", 1, ["star", "moon"], {"min_score": 0.25})]


def test_pictures_of_a_batch_are_asked_about_at_once(module):
    model = Found(Detection("cat", (0, 0, 10, 10), 1.0))
    answers = module.FiftyOneModel(model, "cat ; dog").predict_all([picture(), picture(20, 20), picture(10, 30)])
    boxes = [[round(v, 4) for v in answer.detections[0].bounding_box] for answer in answers]
    assert boxes == [[0, 0, 0.125, 0.25], [0, 0, 0.5, 0.5], [0, 0, 1, 0.3333]]
    assert model.asked == [("detect", 3, "cat ; dog", {})]
    assert module.FiftyOneModel(Found(), "cat").predict(picture()).detections == []


@pytest.mark.parametrize(
    "box, part", [((8, 10, 16, 20), (8, 10, 16, 20)), ((8.5, 9.5, 8.6, 9.6), (8, 9, 9, 10)), ((80, 40, 90, 50), None)]
)
def test_masks_are_those_of_the_box(module, monkeypatch, box, part):
    monkeypatch.setattr(Found, "mask_decoder", lambda self: None)
    mask = np.random.default_rng(0).random((40, 80)) < 0.5
    found = module.FiftyOneModel(Found(Detection("cat", box, 0.5, mask=mask)), "cat", "segment").predict(picture())
    x0, y0, x1, y1 = part or (79, 39, 80, 40)  # an object beyond the edge has a pixel of it
    np.testing.assert_array_equal(found.detections[0].mask, mask[y0:y1, x0:x1])


def test_what_cannot_be_is_known_at_once(module):
    with pytest.raises(errors.PromptError, match="task='caption'"):
        module.FiftyOneModel(Found(), "cat", task="caption")
    with pytest.raises(errors.CheckpointError, match="vae-oid"):
        module.FiftyOneModel(Found(), "cat", task="segment")


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(errors.ConfigError, match=r'pip install -e "\.\[fiftyone\]"'):
        importlib.import_module(MODULE)
