"""The most likely tokens in the place of each token of an answer, beside the model's logits."""

import numpy as np

import paligemma_jax as pj
from paligemma_jax.engine import steps
from tests.serving.conftest import assert_same


def test_the_most_likely_tokens_are_those_of_the_model(engine, model, requests, expected):
    """Whoever else is there: in the place of each token, those with the largest logits after the ones before it."""
    counts = {
        0: 1,
        3: 20,
        4: 7,
        6: 3,
        8: 5,
    }  # greedy, sampled, constrained, two images, one that grows
    answers = {i: engine.submit(requests[i], top_logprobs=count) for i, count in counts.items()}
    others = [engine.submit(requests[i]) for i in (1, 2, 5)]
    for i, answer in answers.items():
        *pieces, last = answer
        assert_same(last, expected[i])
        tokens, top = last.output.tokens, last.top
        logits = logits_of(model, requests[i], tokens)
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        assert top.ids.shape == top.logprobs.shape == (len(tokens), counts[i])
        assert all(len(set(ids)) == counts[i] for ids in top.ids.tolist())
        assert (np.diff(top.logprobs, axis=-1) <= 0).all()
        for right in (np.take_along_axis(logprobs, top.ids, -1), -np.sort(-logprobs, axis=-1)[:, : counts[i]]):
            np.testing.assert_allclose(top.logprobs, right, rtol=1e-3, atol=1e-4)
        said = top.ids == tokens[:, None]  # the same number stands in both places
        np.testing.assert_allclose(top.logprobs[said], last.output.logprobs[said.any(axis=1)], rtol=1e-5, atol=1e-6)
        for name in ("ids", "logprobs"):
            heard = np.concatenate([getattr(piece.top, name) for piece in pieces])
            np.testing.assert_array_equal(heard, getattr(top, name))
    for answer in others:
        *pieces, last = answer
        assert last.top is None and all(piece.top is None for piece in pieces)


def logits_of(model: pj.PaliGemma, request: pj.Request, tokens: np.ndarray) -> np.ndarray:
    """Logits f64 [n, V] from which each of some tokens was chosen, in one pass over all of them."""
    batch = model.processor.layout([list(range(len(request.images)))], [request.prompt])
    ids = np.concatenate([batch.tokens[0, : batch.length[0]], tokens])[None]
    slots = np.concatenate([batch.image_slots[0, : batch.length[0]], np.full(len(tokens), -1, np.int32)])[None]
    soft_tokens = np.asarray(model.embed_image(list(request.images)))
    whole = steps.Inputs(soft_tokens, ids, slots, batch.prefix_length, np.array([ids.shape[1]], np.int32))
    positions = batch.prefix_length[:, None] - 1 + np.arange(len(tokens))[None]
    hidden, _ = steps.apply(model.params, model.config, "prefill", *whole.arrays, positions)
    return np.asarray(steps.apply(model.params, model.config, "logits", hidden[0]), np.float64)
