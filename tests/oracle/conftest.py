"""What our networks and our engine compute for a `Batch`, to be compared with transformers, live or frozen."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation import engine
from paligemma_jax.generation.sampling import Sampling, row_keys
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: PaliGemmaConfig, params: dict, *arrays: jax.Array) -> jax.Array:
    return PaliGemma(config).apply({"params": params}, *arrays)


def _logits(config: PaliGemmaConfig, params: dict, batch: Batch) -> np.ndarray:
    arrays = (batch.pixels, batch.tokens, batch.image_slots, batch.prefix_length, batch.length)
    return np.asarray(_forward(config, params, *arrays))


def _greedy(config: PaliGemmaConfig, params: dict, batch: Batch, max_new_tokens: int) -> np.ndarray:
    clock, rows = engine.Clock({}), range(len(batch.tokens))
    soft_tokens = engine.embed_pictures(params, config, batch.pixels, clock)
    inputs = engine.prepare(batch, soft_tokens, rows)
    keys = row_keys(0, range(len(inputs.tokens)))
    rule, chunk = Sampling().rule(), 8
    chunks = engine.generate(params, config, inputs, keys, rule, max_new_tokens, chunk, clock)
    return np.concatenate([tokens for tokens, _ in chunks])[:, : len(rows)].T


@pytest.fixture(scope="session")
def our_logits() -> Callable[[PaliGemmaConfig, dict, Batch], np.ndarray]:
    """our_logits(config, params, batch): teacher-forced logits f32 [B, T, V]."""
    return _logits


@pytest.fixture(scope="session")
def our_greedy() -> Callable[[PaliGemmaConfig, dict, Batch, int], np.ndarray]:
    """our_greedy(config, params, batch, max_new_tokens): tokens i32 [B, max_new_tokens] of the real engine."""
    return _greedy


@pytest.fixture(scope="session")
def error() -> Callable[[np.ndarray, np.ndarray, Batch], float]:
    """error(a, b, batch): largest difference of two sets of logits at valid positions."""

    def largest(a: np.ndarray, b: np.ndarray, batch: Batch) -> float:
        valid = np.arange(batch.tokens.shape[1])[None] < batch.length[:, None]
        return float(np.abs(a - b)[valid].max())

    return largest
