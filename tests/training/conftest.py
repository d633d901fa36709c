"""A very small model with random weights, and a checkpoint directory of it."""

import dataclasses
from pathlib import Path

import pytest

import paligemma_jax as pj
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor


@pytest.fixture(scope="session")
def small(gemma2, tokenizer) -> PaliGemmaConfig:
    """The small Gemma 2 with the shared tokenizer and images of 16 patches."""
    vision = dataclasses.replace(gemma2.vision, patch_size=7)
    text = dataclasses.replace(gemma2.text, vocab_size=tokenizer.vocab_size + 8)
    return dataclasses.replace(gemma2, vision=vision, text=text, image_token_id=tokenizer.vocab_size)


@pytest.fixture(scope="session")
def processor(small, tokenizer) -> Processor:
    return Processor(small, tokenizer, ImageSettings(small.vision.image_size))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, small, random_params, processor) -> Path:
    """A directory with random weights."""
    directory = tmp_path_factory.mktemp("training") / "random"
    pj.PaliGemma(small, random_params(small), processor).save(directory)
    return directory
