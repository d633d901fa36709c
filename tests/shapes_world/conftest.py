"""Scenes, their records, a tokenizer of the demo world, and the geometry of a very small model that uses it."""

import dataclasses

import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.shapes_world import stages
from paligemma_jax.shapes_world.pool import mixed_scene_at, scene_record
from paligemma_jax.shapes_world.scenes import Scene, scene_at


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    return [scene_at(0, index, max_side=240) for index in range(160)]


@pytest.fixture(scope="session")
def pool(scenes) -> dict[str, np.ndarray]:
    """Records of `scenes` for pictures of 28 pixels and patches of 7."""
    records = [scene_record(scene, 28, 7) for scene in scenes]
    return {key: np.stack([record[key] for record in records]) for key in records[0]}


@pytest.fixture(scope="session")
def mixed_pool() -> dict[str, np.ndarray]:
    """The same of scenes of both worlds."""
    records = [scene_record(mixed_scene_at(0, index, 0.75), 28, 7) for index in range(48)]
    return {key: np.stack([record[key] for record in records]) for key in records[0]}


@pytest.fixture(scope="session")
def codes(pool) -> np.ndarray:
    """Mask codes of the shapes of `pool`, made up."""
    return np.random.default_rng(0).integers(0, 128, (2, *pool["shape"].shape, 16), np.uint8)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return stages.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", seed=0)


@pytest.fixture(scope="session")
def small(gemma2, tokenizer) -> PaliGemmaConfig:
    """The small Gemma 2 with this tokenizer and pictures of 16 patches."""
    vision = dataclasses.replace(gemma2.vision, patch_size=7)
    text = dataclasses.replace(gemma2.text, vocab_size=tokenizer.vocab_size + 8)
    return dataclasses.replace(gemma2, vision=vision, text=text, image_token_id=tokenizer.vocab_size)


@pytest.fixture(scope="session")
def processor(small, tokenizer) -> Processor:
    return Processor(small, tokenizer, ImageSettings(small.vision.image_size))
