"""The measure of where maps point."""

import dataclasses
import math
import types

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.shapes_world import pointing as module
from paligemma_jax.shapes_world.pointing import coverage, pointing
from paligemma_jax.shapes_world.samples import Sample

MASKS = np.zeros((2, 30, 30), bool)
MASKS[0, :10, :10] = MASKS[1, 20:, 10:] = True
KINDS = [("red", "circle"), ("blue", "square")]


def _scene(seed: int, index: int) -> Sample:
    picture = Image.fromarray(np.random.default_rng((seed, index)).integers(0, 256, (30, 30, 3), np.uint8))
    return Sample(picture, KINDS if index else [KINDS[0]] * 2, [(0.0, 0.0, 9.0, 9.0)] * 2, MASKS)


@pytest.fixture(scope="module")
def model(small, random_params, tokenizer) -> pj.PaliGemma:
    """Random weights and nine patches."""
    config = dataclasses.replace(small, vision=dataclasses.replace(small.vision, image_size=42, patch_size=14))
    return pj.PaliGemma(config, random_params(config), Processor(config, tokenizer, ImageSettings(42)))


@pytest.fixture
def answering(model, monkeypatch):
    """answering(text): what the model says."""

    def patch(text: str) -> pj.PaliGemma:
        output = types.SimpleNamespace(text=text)
        monkeypatch.setattr(model, "generate", lambda pictures, prompts, *_: [output] * len(prompts))
        return model

    return patch


def test_coverage_is_the_share_of_each_patch():
    mask = np.zeros((40, 60), bool)
    mask[:20, :15] = True
    np.testing.assert_allclose(coverage(mask, 4), [0.5, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(coverage(MASKS[1], 9), [0, 0, 0, 0, 0, 0, 0, 1, 1], atol=1e-6)


def test_a_map_of_the_mask_is_all_inside_and_an_even_one_is_chance(answering, monkeypatch):
    truth = {"red circle": coverage(MASKS[0], 9), "blue square": coverage(MASKS[1], 9)}
    plain = module._maps

    def maps(model, picture, name, answer):
        return plain(model, picture, name, answer) | {"table": truth[name], "hidden": truth["red circle"]}

    monkeypatch.setattr(module, "_maps", maps)
    found = pointing(answering(""), 3, 0, _scene)
    assert found["things"] == 4 and found["answered"] == 0  # the first scene has two alike
    assert found["chance"] == pytest.approx((1 + 2) / 2 / 9)
    assert found["chance_among"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found["table"] == found["table_among"] == pytest.approx(1)
    assert found["hidden"] == found["hidden_among"] == pytest.approx(0.5)
    assert math.isnan(found["attention_label"]) and math.isnan(found["attention_locations_among"])


def test_attention_is_that_of_the_thing_that_was_found(answering):
    found = pointing(answering("<loc0001><loc0002><loc1000><loc1023> red circle"), 2, 0, _scene)
    assert found["things"] == 2 and found["answered"] == 1
    assert 0 < found["attention_locations"] < 1
    assert all(0 <= value <= 1 for key, value in found.items() if key not in ("things", "answered"))
