"""Random inputs for the small geometries, and the whole network without a cache to compare with."""

import jax
import numpy as np
import pytest

from paligemma_jax.generation.clock import Clock
from paligemma_jax.generation.engine import Inputs, prepare
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch


def _make_batch(config, prompt_lengths, num_tokens=12) -> Batch:
    """One picture per row (soft tokens 4 i .. 4 i + 3), bos and random ids up to each row's length."""
    rng = np.random.default_rng(1)
    count, num_soft = len(prompt_lengths), config.vision.num_tokens
    length = np.array(prompt_lengths, np.int32)
    at = np.arange(num_tokens)[None]
    tokens = np.where(at < length[:, None], rng.integers(3, 90, (count, num_tokens)), config.pad_token_id)
    tokens[:, :num_soft], tokens[:, num_soft] = config.image_token_id, config.bos_token_id
    slots = np.where(at < num_soft, at + num_soft * np.arange(count)[:, None], -1)
    pixels = np.zeros((0, config.vision.image_size, config.vision.image_size, 3), np.float32)
    return Batch(pixels, tokens.astype(np.int32), slots.astype(np.int32), length, length)


@pytest.fixture(scope="session")
def make_inputs():
    """make_inputs(config, prompt_lengths, rows=all): engine inputs of prompts with random pictures and ids."""

    def make(config, prompt_lengths, rows=None) -> Inputs:
        batch = _make_batch(config, prompt_lengths)
        shape = (len(prompt_lengths), config.vision.num_tokens, config.text.width)
        return prepare(batch, jax.random.normal(jax.random.key(2), shape), rows or range(len(prompt_lengths)))

    return make


@pytest.fixture
def clock():
    return Clock({})


@pytest.fixture(scope="session")
def full_logits():
    """full_logits(config, params, inputs, row, answer): logits [len(answer) + 1, V] of a row, without a cache."""

    def compute(config, params, inputs, row, answer, num_tokens=32) -> np.ndarray:
        prefix = int(inputs.prefix_length[row])
        tokens, slots = np.zeros((1, num_tokens), np.int32), np.full((1, num_tokens), -1, np.int32)
        tokens[0, :prefix] = inputs.tokens[row, :prefix]
        tokens[0, prefix : prefix + len(answer)] = answer
        slots[0, :prefix] = inputs.image_slots[row, :prefix]
        lengths = np.array([prefix], np.int32), np.array([prefix + len(answer)], np.int32)
        logits = _logits(config, params, inputs.soft_tokens, tokens, slots, *lengths)
        return np.asarray(logits)[0, prefix - 1 : prefix + len(answer)]

    return compute


def _all_logits(config, params, *arrays):
    model = PaliGemma(config)
    hidden, _ = model.apply({"params": params}, *arrays, method="prefill")
    return model.apply({"params": params}, hidden, method="logits")


_logits = jax.jit(_all_logits, static_argnums=0)
