"""Distributions of the next token of rows among others, beside those of the same rows alone."""

import jax
import numpy as np
import pytest

import paligemma_jax as pj
from benchmarks.crowd import compare_distributions, divergence
from paligemma_jax.serving.programs import Programs
from paligemma_jax.serving.settings import EngineSettings

SETTINGS = EngineSettings(num_slots=4, max_new_tokens=32, max_prompt_tokens=32, max_images=2)


def requests() -> list[pj.Request]:
    """Prompts of several lengths, one of them with two images, greedy and sampled."""
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    hot = pj.Sampling(temperature=1.5, seed=3)
    return [
        pj.Request.of([images[0]], "caption en", max_new_tokens=32, min_new_tokens=32),
        pj.Request.of([images[1], images[2]], "answer en how many circles are there in both?", max_new_tokens=32),
        pj.Request.of([images[1]], "segment a ; two blue squares", sampling=hot, max_new_tokens=32, constrain=True),
        pj.Request.of([images[2]], "what", sampling=hot, max_new_tokens=32, min_new_tokens=32),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, most", [("float32", 1e-10), ("bfloat16", 1e-3)])
def test_a_crowd_changes_no_distribution(make_model, dtype, most):
    """Rounding aside; a mask that lets a row see another, or its padding, gives 0.03 and more."""
    model = make_model("gemma2")
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    model = pj.PaliGemma(model.config, params, model.processor)
    found = compare_distributions(model, Programs(model, SETTINGS), requests(), SETTINGS)
    assert len(found) == len(requests()) and 0 <= max(found) <= most, found


def test_divergence_is_zero_for_equals_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 500).astype(np.float32)
    assert divergence(logits, logits) == 0 and divergence(logits, logits + 7) == pytest.approx(0, abs=1e-12)
    other = logits.copy()
    other[3] += 0.5
    p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in (logits.astype(float), other.astype(float)))
    assert divergence(logits, other) == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-9)
    assert divergence(logits, rng.permutation(logits)) > 0.03
