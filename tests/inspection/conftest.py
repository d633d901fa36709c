"""A random model that answers nonsense about a random picture, and what is inside."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.engine.forward import Trace
from paligemma_jax.inspection.findings import KINDS, Findings, inspect_answer
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor

PROMPT = "detect red circle"
ANSWER = "<loc0001><loc0002><loc1000><loc1023> red circle"


@pytest.fixture(scope="session")
def model(gemma2, random_params, tokenizer) -> pj.PaliGemma:
    """Nine patches, three layers, four heads."""
    text = dataclasses.replace(gemma2.text, num_layers=3, vocab_size=tokenizer.vocab_size + 8)
    vision = dataclasses.replace(gemma2.vision, image_size=42)
    config = dataclasses.replace(gemma2, text=text, vision=vision, image_token_id=tokenizer.vocab_size)
    return pj.PaliGemma(config, random_params(config), Processor(config, tokenizer, ImageSettings(42)))


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


@pytest.fixture(scope="session")
def trace(model, picture) -> Trace:
    return model.trace(picture, PROMPT, ANSWER)


@pytest.fixture(scope="session")
def findings(model, picture) -> Findings:
    """Everything."""
    return inspect_answer(model, picture, PROMPT, ANSWER, "red circle", KINDS, num_words=3, occlusion_size=2)
