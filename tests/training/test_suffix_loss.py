import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training.loss import dropout_keys, mean_where, suffix_loss, token_losses

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


@pytest.mark.parametrize("dtype, most", [("float32", 1.0), ("bfloat16", 0.5)])
def test_matmuls_with_float32_weights_are_true_float32_on_every_platform(small, random_params, make_batch, dtype, most):
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(small))
    text = str(jax.make_jaxpr(lambda p: token_losses(PaliGemma(small), p, make_batch(48), 12))(params))
    share = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") / text.count("dot_general")
    assert share == 1 if most == 1 else share < most


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


def change(batch, row, position, token):
    tokens = batch["tokens"].copy()
    assert tokens[row, position] != token
    tokens[row, position] = token
    return {**batch, "tokens": tokens}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_later_suffix_token_changes_nothing_before_it(small, random_params, make_batch, dropout):
    """Bit for bit: losses up to and with the token before the one that is changed, and all of the other rows."""
    batch = {**make_batch(48), "dropout_keys": dropout_keys(0, 0, 3)}
    model, num_answers = PaliGemma(small), 12
    compute = jax.jit(lambda p, b: token_losses(model, p, b, num_answers, dropout=dropout))
    first = int(batch["prefix_length"][0])
    plain, _, exists = compute(random_params(small), batch)
    assert int(exists[0].sum()) > 5
    for place in (1, 3, 5):
        changed, _, _ = compute(random_params(small), change(batch, 0, first + place, 7))
        np.testing.assert_array_equal(changed[0, :place], plain[0, :place])
        np.testing.assert_array_equal(changed[1:], plain[1:])
        assert (changed[0, place : place + 2] != plain[0, place : place + 2]).all()


def test_three_tokens_by_hand_labels_are_shifted_once():
    """Each suffix token, and eos, is said by the position before it: a network whose logits are its inputs' ids."""

    class Echo:
        """Logits of each column: 2 for the token after the one that stands there, 0 for the other four."""

        def apply(self, variables, *args, method):
            if method == "embed_image":
                return args[0]
            if method == "logits":
                return args[0]
            _, tokens, _, _, _, columns, dropout = args
            assert dropout is None
            said = jnp.take_along_axis(tokens, columns, axis=1)
            return 2.0 * jax.nn.one_hot((said + 1) % 5, 5), None

    tokens = np.array([[4, 0, 1, 2, 3, 0]])  # prefix 4 0, suffix 1 2 3, padding
    batch = {"tokens": tokens, "image_slots": tokens * 0 - 1, "pixels": np.zeros(1)}
    batch |= {"prefix_length": np.array([2]), "length": np.array([5])}
    params = {"language_model": {"norm": {"weight": np.ones(1)}}}
    losses, correct, exists = token_losses(Echo(), params, batch, 4)
    right = -2.0 + np.log(np.exp(2.0) + 4)  # of a token that has the logit 2
    np.testing.assert_allclose(losses[0, :3], [right] * 3, rtol=1e-6)
    assert exists.tolist() == [[True, True, True, False]] and correct[0, :3].all()
    loss, metrics = suffix_loss(Echo(), 0.0, 4, params, batch)
    assert float(loss) == pytest.approx(right, rel=1e-6) and float(metrics["token_acc"]) == 1
    wrong = np.log(np.exp(2.0) + 4)
    batch["tokens"] = np.array([[4, 0, 1, 3, 3, 0]])  # the second is not said, and what it leads to is not the third
    losses, _, _ = token_losses(Echo(), params, batch, 4)
    np.testing.assert_allclose(losses[0, :3], [right, wrong, wrong], rtol=1e-6)


def test_the_end_is_supervised(small, random_params, make_batch):
    """The last term of each row is that of eos, also of a row whose suffix is empty."""
    batch = make_batch(48)
    loss = jax.jit(lambda p, b: token_losses(PaliGemma(small), p, b, 12))
    losses, _, exists = loss(random_params(small), batch)
    counts = batch["length"] - batch["prefix_length"]
    assert exists.sum(axis=1).tolist() == counts.tolist() and counts[1] == 1
    ends = batch["tokens"][np.arange(3), batch["length"] - 1]
    assert ends.tolist() == [small.eos_token_id] * 3
    for row, count in enumerate(counts):
        other, _, _ = loss(random_params(small), change(batch, row, batch["length"][row] - 1, 7))
        assert other[row, count - 1] != losses[row, count - 1]


def test_a_row_of_padding_counts_nowhere_and_gives_no_nan(small, random_params, make_batch):
    """Three times the same row, or twice and a row of padding, have the same loss and gradient."""
    batch = make_batch(48)
    model = PaliGemma(small)
    compute = jax.jit(jax.value_and_grad(lambda p, b: suffix_loss(model, 0.1, 12, p, b)[0]))

    def rows(count):
        """The first row so many times, and padding."""
        made = {"pixels": batch["pixels"]}
        for name in ("tokens", "image_slots", "prefix_length", "length"):
            nothing = np.full_like(batch[name][:1], -(name == "image_slots"))
            made[name] = np.concatenate([batch[name][:1]] * count + [nothing] * (3 - count))
        return compute(random_params(small), made)

    (loss, gradient), (other, with_padding), (zero, of_nothing) = map(rows, (3, 2, 0))
    assert float(loss) == pytest.approx(float(other), rel=1e-6) and float(zero) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, with_padding)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_nothing))  # NaN is not false
