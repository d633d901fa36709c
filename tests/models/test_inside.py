"""What is told of the inside of a model, and what half precision makes of it, against formulas of their own."""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor
from tests.formulas import Formulas

PROMPT, ANSWER = "detect red circle", "<loc0001> red"


@pytest.fixture(scope="module")
def make(config, tokenizer, random_params):
    """make(dtype): a random model, of both generations in turn."""

    @functools.cache  # a handle keeps its programs
    def build(dtype: str = "float32") -> pj.PaliGemma:
        text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size + 8)
        whole = dataclasses.replace(config, text=text, image_token_id=tokenizer.vocab_size)
        settings = ImageSettings(whole.vision.image_size)
        return pj.PaliGemma(whole, random_params(whole, dtype), Processor(whole, tokenizer, settings))

    return build


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Of the model's own size, so that resizing changes nothing."""
    return list(np.random.default_rng(3).integers(0, 256, (2, 28, 28, 3), np.uint8))


def test_a_trace_is_that_of_the_formulas(make, pictures):
    """Of two pictures seen together: hidden states, attention of each head, log-probabilities, and the logits."""
    model = make()
    trace = model.trace(pictures, PROMPT, ANSWER)
    formulas = Formulas(model.config, model.params)
    pixels = [picture / 127.5 - 1 for picture in pictures]
    text = np.asarray(trace.tokens[2 * model.config.vision.num_tokens :])
    hidden, attention = formulas.inside(pixels, text, trace.prefix_length)
    count = len(trace.tokens) - trace.prefix_length
    answer = slice(trace.prefix_length - 1, len(trace.tokens) - 1)  # an answer's token is said one place earlier
    np.testing.assert_allclose(trace.hidden, hidden, atol=1e-4)
    np.testing.assert_allclose(trace.attention, attention[:, :, answer], atol=1e-5)
    assert np.ptp(attention[:, :, answer], axis=(1, 2)).max() > 0.05, "attention this even would hide a mistake"
    logits = formulas.logits(hidden[-1])[answer]
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(trace.logprobs, chances[np.arange(count), trace.tokens[-count:]], atol=1e-4)
    soft_tokens = hidden[0][: 2 * model.config.vision.num_tokens]
    np.testing.assert_allclose(np.reshape(trace.soft_tokens, soft_tokens.shape), soft_tokens, atol=1e-4)


def test_features_and_their_projection_are_those_of_the_formulas(make, pictures):
    model = make()
    formulas = Formulas(model.config, model.params)
    features = np.stack([formulas.encode(picture / 127.5 - 1) for picture in pictures])
    np.testing.assert_allclose(model.embed_image(pictures, projected=False), features, atol=1e-4)
    projected = formulas.linear("multi_modal_projector/linear", features)
    np.testing.assert_allclose(model.embed_image(pictures), projected, atol=1e-4)
    np.testing.assert_allclose(model.project(features.astype(np.float32)), projected, atol=1e-4)


def test_half_precision_rounds_the_scale_of_text_and_leaves_soft_tokens_unscaled(make, pictures):
    """big_vision and transformers multiply by sqrt(width) rounded to bfloat16; what enters the decoder shows it."""
    model = make("bfloat16")
    trace = model.trace(pictures[0], PROMPT, ANSWER)
    entering = np.asarray(trace.hidden[0])
    table = np.asarray(model.params["language_model"]["embed_tokens"]["weight"])
    assert entering.dtype == table.dtype == ml_dtypes.bfloat16
    scale = np.float32(ml_dtypes.bfloat16(model.config.text.width**0.5))
    rows = table[trace.tokens[trace.patches < 0]].astype(np.float32)
    np.testing.assert_array_equal(entering[trace.patches < 0], (rows * scale).astype(ml_dtypes.bfloat16))
    unrounded = (rows * np.float32(model.config.text.width**0.5)).astype(ml_dtypes.bfloat16)
    assert (unrounded != entering[trace.patches < 0]).any(), "this width would hide the rounding"
    np.testing.assert_array_equal(entering[trace.patches >= 0], np.asarray(model.embed_image(pictures[0]))[0])


def test_half_precision_is_not_far_from_the_formulas(make, pictures):
    """It loses a few thousandths of each number and no more: nothing else is left out on the way."""
    model = make("bfloat16")
    trace = model.trace(pictures[0], PROMPT, ANSWER)
    exact = Formulas(model.config, jax.tree.map(lambda leaf: leaf.astype(np.float32), model.params))
    text = np.asarray(trace.tokens[model.config.vision.num_tokens :])
    hidden, attention = exact.inside([pictures[0] / 127.5 - 1], text, trace.prefix_length)
    for found, expected in zip(np.asarray(trace.hidden, np.float32), hidden, strict=True):
        assert np.abs(found - expected).mean() < 0.01 * expected.std()
    answer = slice(trace.prefix_length - 1, len(trace.tokens) - 1)
    np.testing.assert_allclose(trace.attention, attention[:, :, answer], atol=0.02)
