import dataclasses

import jax
import numpy as np
import pytest

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training.loss import mean_where, suffix_loss

TEXTS = [("caption en", "a red circle and two blue squares"), ("detect star", ""), ("answer en how many", "2")]


@pytest.fixture(scope="module")
def make_batch(processor):
    def make(pad_to):
        prefixes, suffixes = map(list, zip(*TEXTS, strict=True))
        batch = processor.layout([[1], [0], [0]], prefixes, suffixes, pad_to=pad_to)
        pixels = np.random.default_rng(0).uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
        return vars(dataclasses.replace(batch, pixels=pixels))

    return make


@pytest.fixture(scope="module")
def log_probs(small, random_params, make_batch):
    """From the whole network, float64 [B, T, V]."""
    model = PaliGemma(small)
    logits = jax.jit(lambda p, b: model.apply({"params": p}, **b))(random_params(small), make_batch(48))
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_formula_and_padding_changes_nothing(small, random_params, make_batch, log_probs, smoothing):
    batch = make_batch(48)
    rows, right = [], []
    for row, (first, end) in enumerate(zip(batch["prefix_length"], batch["length"], strict=True)):
        losses = []
        for place in range(first, end):  # suffix and eos, said one place earlier
            said, target = log_probs[row, place - 1], batch["tokens"][row, place]
            weight = np.full(len(said), smoothing / (len(said) - 1))
            weight[target] = 1 - smoothing
            losses.append(-(weight * said).sum())
            right.append(said.argmax() == target)
        rows.append(np.mean(losses))
    assert batch["tokens"][1, batch["length"][1] - 1] == small.eos_token_id and len(losses) > 1

    def compute(num_answers, batch):
        model = PaliGemma(small)
        return jax.jit(lambda p, b: suffix_loss(model, smoothing, num_answers, p, b))(random_params(small), batch)

    longest = int((batch["length"] - batch["prefix_length"]).max())
    loss, metrics = compute(longest, batch)
    assert float(loss) == pytest.approx(np.mean(rows), rel=1e-5)
    assert float(metrics["token_acc"]) == pytest.approx(np.mean(right))
    if smoothing:  # which all tokens of the vocabulary are part of
        padded, _ = compute(longest + 9, make_batch(56))
        assert float(padded) == pytest.approx(float(loss), rel=1e-5)


def test_mean_of_nothing_is_zero():
    values, where = np.array([[1.0, 3.0], [np.nan, np.inf]], np.float32), np.array([[True, True], [False, False]])
    np.testing.assert_array_equal(mean_where(values, where, axis=1), [2, 0])
    assert mean_where(values, where) == 2
