"""A step of training: frozen weights, float32 masters, micro-batches, remat, and a float64 reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax import ops
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training.adapters import LoraSettings, init_adapters, target_paths
from paligemma_jax.training.finetune import stacked
from paligemma_jax.training.loss import suffix_loss
from paligemma_jax.training.memory import MemoryTable, memory_table
from paligemma_jax.training.step import init_state, make_step
from paligemma_jax.training.trainable import join, names_of, split
from tests.formulas import Formulas

TEXTS = [("caption en", "a red circle"), ("detect star", ""), ("answer en how many", "2"), ("caption en", "two")]
ANSWERS = 16
Q = "language_model/layers_0/self_attn/q_proj/weight"


@pytest.fixture(scope="module")
def batch(processor):
    """Four rows, each with a picture of its own."""
    prefixes, suffixes = map(list, zip(*TEXTS, strict=True))
    rows = processor.layout([[i] for i in range(4)], prefixes, suffixes, pad_to=40)
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 28, 28, 3)).astype(np.float32)
    return vars(dataclasses.replace(rows, pixels=pixels))


def micro(batch, size, num_tokens=16):
    """Batches of `size` rows as a function of their number; pictures are counted from their first."""

    def part(i):
        rows = slice(i * size, (i + 1) * size)
        found = {name: array[rows] for name, array in batch.items()}
        slots = found["image_slots"]
        return found | {"image_slots": np.where(slots >= 0, slots - i * size * num_tokens, slots)}

    return part


def adapted(small, params, settings, dtype="float32"):
    """Adapters whose B is not zero, and what they stand beside."""
    trained = init_adapters(params, target_paths(settings, names_of(small)), settings, 0)
    trained = jax.tree.map(lambda leaf: leaf + 0.03, trained)
    frozen = jax.tree.map(lambda leaf: leaf.astype(dtype), split(params, [])[1])
    return trained, frozen, functools.partial(join, dtype=dtype, scale=settings.scale)


def loss_of(small, remat=False):
    return functools.partial(suffix_loss, PaliGemma(small, remat=remat), 0.0, ANSWERS)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_trains_changes(small, random_params, batch, dtype):
    """Frozen leaves keep every bit and their dtype, also where they are used narrow; masters are float32."""
    trained, frozen, joined = adapted(small, random_params(small), LoraSettings(2, 4.0), dtype)
    before = jax.tree.map(np.array, frozen)
    step = make_step(loss_of(small), optax.adam(0.01), frozen, joined)
    state = init_state(copied(trained), optax.adam(0.01))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moved = [(new != old).any() for new, old in zip(*map(jax.tree.leaves, (state.params, trained)), strict=True)]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize("format", ops.FORMATS)
def test_adapters_over_quantized_weights_train(small, random_params, batch, format):
    params = jax.tree.map(lambda leaf: leaf, random_params(small))
    trained, _, joined = adapted(small, params, LoraSettings(2, 4.0, use_dora=format == "int8"))
    flat = flatten_dict(split(params, [])[1], sep="/")
    decoder = [path for path in flat if path.startswith("language_model/layers") and flat[path].ndim == 2]
    frozen = unflatten_dict(flat | {path: ops.quantize(flat[path], format) for path in decoder}, sep="/")
    before = jax.tree.map(np.array, frozen)
    step = make_step(loss_of(small), optax.adam(0.01), frozen, joined)
    state, losses = init_state(copied(trained), optax.adam(0.01)), []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[3] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


@pytest.mark.slow
def test_micro_batches_and_remat_change_nothing(small, random_params, batch):
    trained, frozen, joined = adapted(small, random_params(small), LoraSettings(2, 4.0, "all"))
    optimizer = optax.sgd(0.1)

    def after(accumulate, remat=False):
        step = make_step(loss_of(small, remat), optimizer, frozen, joined, accumulate)
        given = stacked(micro(batch, 4 // accumulate), accumulate, 0)
        return step(init_state(copied(trained), optimizer), given)

    state, metrics = after(1)
    for accumulate, remat in ((2, False), (4, True), (1, True)):
        other, same = after(accumulate, remat)
        assert float(same["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
        assert float(same["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other.params, state.params)


def test_remat_is_of_every_layer(small, random_params, batch):
    trained, frozen, joined = adapted(small, random_params(small), LoraSettings(2, 4.0))

    def num_checkpoints(remat):
        jaxpr = jax.make_jaxpr(lambda p: loss_of(small, remat)(joined(p, frozen), batch)[0])(trained)
        return sum(equation.primitive.name in ("checkpoint", "remat2") for equation in jaxpr.eqns)

    assert (num_checkpoints(False), num_checkpoints(True)) == (0, 2 + 2)


def test_micro_batches_are_means():
    """Of a loss that takes no time to compile."""
    batch = {"x": np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)}
    params, optimizer = {"w": jnp.array([1.0, -2.0, 0.5])}, optax.sgd(0.1)

    def loss(params, batch):
        error = batch["x"] @ params["w"] - 1
        return jnp.mean(error**2), {"off": jnp.mean(jnp.abs(error))}

    def after(accumulate):
        given = batch if accumulate == 1 else {"x": batch["x"].reshape(accumulate, -1, 3)}
        return make_step(loss, optimizer, accumulate=accumulate)(init_state(copied(params), optimizer), given)

    state, metrics = after(1)
    for accumulate in (2, 4, 12):
        other, same = after(accumulate)
        assert set(same) == {"loss", "off", "grad_norm"}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (other.params, same), (state.params, metrics)
        )


def test_a_loss_that_is_not_finite_leaves_all_as_it_was(small, random_params, batch):
    trained, frozen, joined = adapted(small, random_params(small), LoraSettings(2, 4.0))
    step = make_step(loss_of(small), optax.adam(0.01), frozen, joined)
    state, metrics = step(init_state(copied(trained), optax.adam(0.01)), batch | {"pixels": batch["pixels"] * np.nan})
    assert np.isnan(metrics["loss"]) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, trained)


@pytest.mark.slow
def test_a_row_of_padding_alone_gives_no_nan(small, random_params, batch):
    """It counts as a loss of 0: such rows are refused where data is read."""
    empty = {name: array.copy() for name, array in batch.items()}
    empty["tokens"][1], empty["image_slots"][1] = small.pad_token_id, -1
    empty["prefix_length"][1] = empty["length"][1] = 0
    trained, frozen, joined = adapted(small, random_params(small), LoraSettings(2, 4.0, "all"))
    (loss, _), grads = jax.value_and_grad(lambda p: loss_of(small)(joined(p, frozen), empty), has_aux=True)(trained)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_loss_gradients_and_three_steps_are_those_of_float64(small, random_params, batch):
    """Of an adapter of rank 1, by the networks' formulas in numpy and central differences."""
    settings, params = LoraSettings(1, 3.0, Q), random_params(small)
    row = {name: array[:1] for name, array in batch.items()}
    trained, frozen, joined = adapted(small, params, settings)
    optimizer = optax.adam(0.02, b2=0.95)
    step, state = make_step(loss_of(small), optimizer, frozen, joined), init_state(copied(trained), optimizer)

    part = flatten_dict(trained, sep="/")
    theta = np.concatenate([np.asarray(part[f"{Q}/{name}"], np.float64).reshape(-1) for name in ("down", "up")])
    width, formulas = part[f"{Q}/down"].size, Formulas(small, params)
    base, (first, end) = formulas.params[Q], (int(row[name][0]) for name in ("prefix_length", "length"))
    text = row["tokens"][0, 16:end]
    formulas.encode = functools.cache(lambda _, encode=formulas.encode: encode(row["pixels"][0]))

    def loss(theta):
        formulas.params[Q] = base + settings.scale * np.outer(theta[width:], theta[:width])
        logits = formulas([0], text, first)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.mean([log_probs[at - 1, row["tokens"][0, at]] for at in range(first, end)])

    mean, square = np.zeros(len(theta)), np.zeros(len(theta))
    for count in range(1, 4):
        moves = 1e-4 * np.eye(len(theta))
        gradient = np.array([loss(theta + move) - loss(theta - move) for move in moves]) / 2e-4
        expected = loss(theta)
        state, metrics = step(state, row)
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-4)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        theta = theta - 0.02 * mean / (1 - 0.9**count) / (np.sqrt(square / (1 - 0.95**count)) + 1e-8)
    found = flatten_dict(state.params, sep="/")
    found = np.concatenate([np.asarray(found[f"{Q}/{name}"]).reshape(-1) for name in ("down", "up")])
    np.testing.assert_allclose(found, theta, rtol=1e-3, atol=2e-5)


def test_memory_is_that_of_the_compiled_step(small, random_params, batch):
    trained, frozen, joined = adapted(small, random_params(small), LoraSettings(2, 4.0))
    optimizer = optax.adam(0.01)
    step, state = make_step(loss_of(small), optimizer, frozen, joined), init_state(copied(trained), optimizer)
    table = memory_table(step.compile(state, batch), state, frozen)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (trained, frozen)]
    assert [table.rows["trained weights"], table.rows["frozen weights"]] == sizes
    assert table.rows["optimizer state"] == 2 * sizes[0] + 4
    assert table.rows["batch"] >= batch["pixels"].nbytes and table.rows["gradients and activations"] > sizes[0]
    assert table.total == sum(table.rows.values()) and table.limit > table.total and table.fits
    assert "MB" in str(table) and "more than there is" not in str(table)
    state, metrics = step(state, batch)  # by the same program
    assert np.isfinite(metrics["loss"])


def test_too_much_memory_is_said():
    table = MemoryTable({"weights": 3 * 10**9, "batch": 10**6}, 2 * 10**9)
    assert not table.fits and "3.0 GB" in str(table) and "1.0 MB" in str(table)
    assert "more than there is: a smaller batch_size" in str(table)
    assert MemoryTable({"weights": 3}, None).fits
