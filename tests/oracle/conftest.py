"""What our networks and our engine compute for a `Batch`, to be compared with transformers, live or frozen."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.engine import steps
from paligemma_jax.engine.sampling import row_keys, row_options, step_config
from paligemma_jax.engine.state import answer_size
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.request import GenerateOptions


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: PaliGemmaConfig, params: dict, *arrays: jax.Array) -> jax.Array:
    return PaliGemma(config).apply({"params": params}, *arrays)


def _logits(config: PaliGemmaConfig, params: dict, batch: Batch) -> np.ndarray:
    arrays = (batch.pixels, batch.tokens, batch.image_slots, batch.prefix_length, batch.length)
    return np.asarray(_forward(config, params, *arrays))


def _greedy(config: PaliGemmaConfig, params: dict, batch: Batch, max_new_tokens: int) -> np.ndarray:
    rows = range(len(batch.tokens))
    soft_tokens = steps.run(params, batch.pixels, config=config, method="embed_image")
    inputs = steps.select_rows(batch, soft_tokens, rows)
    options = [GenerateOptions(max_new_tokens)] * len(inputs.tokens)
    step = step_config(config, None, options, constrained=False)
    num_tokens = answer_size(max_new_tokens)
    size = {"num_tokens": num_tokens, "num_slots": inputs.tokens.shape[1] + num_tokens}
    keys = row_keys([0] * len(options), range(len(options)))
    state = steps.prefill(params, inputs, row_options(options, keys, None), config=step, **size)
    while not state.done.all():
        state = steps.decode(params, state, config=step, num_steps=8)
    return np.asarray(state.tokens)[: len(rows), :max_new_tokens]


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
