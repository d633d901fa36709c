"""Embeddings of one picture in another one's place, for Gemma and Gemma 2: the answer is that of the other picture."""

import dataclasses

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax import api
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.processor import Processor

PROMPTS = ["caption en", "detect red circle"]
HOT = pj.Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model(config, random_params, tokenizer) -> pj.PaliGemma:
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size + 8)
    whole = dataclasses.replace(config, text=text, image_token_id=tokenizer.vocab_size)
    return pj.PaliGemma(whole, random_params(whole), Processor(whole, tokenizer, ImageSettings(28)))


@pytest.mark.parametrize("projected", [True, False], ids=["projected", "features"])
def test_injected_embeddings_are_the_picture(model, projected, monkeypatch):
    black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    own = {id(p): model.generate(p, PROMPTS, 12, HOT) for p in (black, white)}
    logits = [model.logits(p, PROMPTS[0], "a red circle") for p in (black, white)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3  # the model does look at its picture
    captured = {id(p): model.embed_image(p, projected) for p in (black, white)}
    monkeypatch.setattr(api, "embed_images", None)  # from here on it would be an error
    for picture, other in ((black, black), (black, white), (white, black)):
        soft_tokens = captured[id(other)] if projected else model.project(captured[id(other)])
        found = model.generate(picture, PROMPTS, 12, HOT, image_embeddings=soft_tokens)
        for output, expected in zip(found, own[id(other)], strict=True):
            np.testing.assert_array_equal(output.tokens, expected.tokens)
