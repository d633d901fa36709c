"""An engine with few slots on a small model, requests of all kinds, and their answers alone."""

import dataclasses

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.serving import programs
from paligemma_jax.serving.engine import Engine, EngineSettings
from paligemma_jax.serving.events import Finished

HOT = {"temperature": 1.5, "seed": 3}
REQUESTS = [  # prompt, number of images, options
    ("caption en", 1, {"max_new_tokens": 14}),
    ("detect a red circle", 1, {"constrain": True, "max_new_tokens": 24}),
    ("answer en how many", 1, {"sampling": pj.Sampling(**HOT), "max_new_tokens": 9}),
    ("segment a ; two blue squares", 1, {"constrain": True, "sampling": pj.Sampling(**HOT), "max_new_tokens": 32}),
    ("caption en", 2, {"sampling": pj.Sampling(**HOT, top_k=7), "max_new_tokens": 12, "min_new_tokens": 12}),
    ("detect red", 1, {"max_new_tokens": 1}),
    ("segment the circle", 1, {"sampling": pj.Sampling(**HOT, top_p=0.6), "max_new_tokens": 11}),
    ("what color", 2, {"sampling": pj.Sampling(temperature=0.7, min_p=0.2), "max_new_tokens": 20}),
    ("caption en", 1, {"max_new_tokens": 40, "min_new_tokens": 40}),  # outgrows the usual state
    ("detect " + " ; ".join("abcdefghi"), 1, {"constrain": True, "max_new_tokens": 20}),  # a large grammar
    ("detect a red circle", 1, {"constrain": True, "max_new_tokens": 24, "speculate": True}),
]
SETTINGS = EngineSettings(num_slots=2, max_waiting=20, max_new_tokens=40, max_prompt_tokens=32, max_images=2)


@pytest.fixture(scope="session")
def model(make_model) -> pj.PaliGemma:
    return make_model("gemma2")


@pytest.fixture(scope="session")
def requests() -> list[pj.Request]:
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
    return [
        pj.Request.of([images[(i + k) % 4] for k in range(count)], prompt, **options)
        for i, (prompt, count, options) in enumerate(REQUESTS)
    ]


@pytest.fixture(scope="session")
def expected(model, requests) -> list[pj.Output]:
    """Tokens do not depend on the batch: tests/engine/test_slots.py."""
    plain = [dataclasses.replace(r, options=dataclasses.replace(r.options, speculate=None)) for r in requests]
    return model.answer(plain)


@pytest.fixture(scope="session")
def engine(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_SHORT_ANSWER", 16)
        patch.setattr(programs, "_SHORT_TEXTS", (32,))
        engine = Engine(model, SETTINGS)
    engine.start()
    engine.wait_ready(120)
    yield engine
    engine.close()
    assert engine.stats().compiles_while_serving == 0


def assert_same(finished: Finished, expected: pj.Output) -> None:
    output = finished.output
    assert output.tokens.tolist() == expected.tokens.tolist()
    assert (output.text, output.finish_reason) == (expected.text, expected.finish_reason)
    for name in ("logprobs", "near", "expected"):
        np.testing.assert_allclose(getattr(output, name), getattr(expected, name), rtol=1e-3, atol=1e-4)
    assert finished.reason == output.finish_reason and output.timing.new_tokens == len(output.tokens)
    assert 0 <= finished.queue_s <= finished.first_token_s <= finished.total_s
