"""Schedules, what learns slower or decays by pattern, and the average of the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.loop import fit
from paligemma_jax.training.optimizer import Recipe, averaged, make_optimizer, make_schedule
from paligemma_jax.training.step import init_state, make_step
from tests.training.toy import WEIGHTS, assert_same, batch_at, loss_fn

PARAMS = {
    "vision_tower": {"fc": {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "language_model": {"norm": {"weight": jnp.ones(2)}},
}
PATHS = ("vision_tower/fc/bias", "vision_tower/fc/weight", "language_model/norm/weight")


def moves(recipe, gradient=1.0):
    """How far each parameter goes in the first step, by path."""
    optimizer = make_optimizer(recipe, 10)
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(jax.tree.map(lambda x: jnp.full_like(x, gradient), PARAMS), state, PARAMS)
    flat = jax.tree_util.tree_leaves_with_path(updates)
    return {"/".join(entry.key for entry in path): float(value.reshape(-1)[0]) for path, value in flat}


RECIPE = Recipe(learning_rate=0.5, weight_decay=0.0, clip_norm=1e9, warmup_fraction=0.0)


@pytest.mark.parametrize(
    "schedule, heights",
    [("cosine", [0, 0.5, 1, 0.853553, 0.5]), ("linear", [0, 0.5, 1, 0.75, 0.5]), ("constant", [0, 0.5, 1, 1, 1])],
)
def test_schedules(schedule, heights):
    recipe = Recipe(schedule=schedule, warmup_fraction=0.2)
    height = make_schedule(recipe, 10)
    np.testing.assert_allclose([height(step) for step in (0, 1, 2, 4, 6)], heights, rtol=1e-5)
    assert float(height(10)) == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-6)
    assert float(make_schedule(dataclasses.replace(recipe, warmup_fraction=0.0), 10)(0)) == 1.0


def test_the_first_pattern_that_fits_sets_the_learning_rate():
    recipe = dataclasses.replace(RECIPE, lr_multipliers="vision_tower/fc/bias=0.5 ; vision_tower=0.1 ; .*=2")
    found = moves(recipe)
    for path, factor in zip(PATHS, (0.5, 0.1, 2.0), strict=True):
        assert found[path] == pytest.approx(-0.5 * factor, rel=1e-5)
    assert all(value == pytest.approx(-0.5, rel=1e-5) for value in moves(RECIPE).values())


def test_decay_is_by_pattern_and_by_no_learning_rate():
    decayed = dataclasses.replace(RECIPE, weight_decay=0.25, lr_multipliers="bias=0.5 ; .*=1")
    assert [moves(decayed, 0.0)[path] for path in PATHS] == [0, -0.25, 0]  # kernels of the picture side
    chosen = dataclasses.replace(decayed, decayed="norm ; .*/bias")
    assert [moves(chosen, 0.0)[path] for path in PATHS] == [-0.25, 0, -0.25]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"lr_multipliers": "vision_tower=0.1"}, "language_model/norm/weight and 0 more parameters fit none"),
        ({"lr_multipliers": "vision_towr=0.1 ; .*=1"}, "'vision_towr' matches no parameter"),
        ({"decayed": "qproj"}, "'qproj' matches no parameter"),
        ({"decayed": "(norm"}, "'\\(norm' is neither a name nor a regular expression"),
    ],
)
def test_patterns_and_parameters_that_match_nothing_are_errors(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(dataclasses.replace(RECIPE, **keys), 10).init(PARAMS)


@pytest.mark.parametrize("text", ["vision_tower", "a=b", "=1", "a=0", "a=-1", "a=nan", "a=inf"])
def test_multipliers_are_numbers_above_zero(text):
    with pytest.raises(ConfigError, match=r"lr_multipliers: .* is not possible: give PATTERN=NUMBER"):
        Recipe(lr_multipliers=text)


def test_other_schedules_are_refused():
    with pytest.raises(ConfigError, match="schedule='cosin' is not possible: give cosine, linear, constant"):
        Recipe(schedule="cosin")


def test_b1_is_that_of_adam():
    """After a gradient of 1, one of 0: what Adam's momentum keeps."""
    sizes = {}
    for b1 in (0.9, 0.5):
        optimizer = make_optimizer(dataclasses.replace(RECIPE, b1=b1, schedule="constant"), 10)
        params, state = {"language_model": {"w": jnp.zeros(1)}}, None
        state = optimizer.init(params)
        for gradient in (1.0, 0.0):
            updates, state = optimizer.update(jax.tree.map(lambda x, g=gradient: x + g, params), state, params)
        first, second = (1 - b1) * b1 / (1 - b1**2), 0.999 * 0.001 / (1 - 0.999**2)
        sizes[b1] = -float(updates["language_model"]["w"][0])
        assert sizes[b1] == pytest.approx(0.5 * first / second**0.5, rel=1e-4)
    assert sizes[0.9] > sizes[0.5]


def test_clipping_is_over_what_the_optimizer_is_given():
    """Of gradients 3 and 4 with a limit of 1, with the momentum off: 0.6 and 0.8 go into Adam's first moment."""
    optimizer = make_optimizer(dataclasses.replace(RECIPE, clip_norm=1.0), 10)
    params = {"a": {"w": jnp.zeros(1)}, "b": {"w": jnp.zeros(1)}}
    _, state = optimizer.update(
        {"a": {"w": jnp.full(1, 3.0)}, "b": {"w": jnp.full(1, 4.0)}}, optimizer.init(params), params
    )
    moment = next(x for x in state if isinstance(x, optax.ScaleByAdamState)).mu
    np.testing.assert_allclose([moment["a"]["w"][0], moment["b"]["w"][0]], [0.06, 0.08], rtol=1e-5)


def average_recipe(ema):
    return Recipe(learning_rate=0.05, weight_decay=0.0, clip_norm=1e9, warmup_fraction=0.0, ema=ema)


def start(ema):
    optimizer = make_optimizer(average_recipe(ema), 30)
    return init_state({"w": jnp.zeros(4), "b": jnp.zeros(())}, optimizer), make_step(loss_fn, optimizer)


def test_the_average_is_that_of_the_parameters():
    plain, plain_step = start(0.0)
    state, step = start(0.3)
    assert averaged(plain) is plain.params
    average = np.zeros(4)
    for number in range(12):
        plain, _ = plain_step(plain, batch_at(number))
        state, _ = step(state, batch_at(number))
        kept = min(0.3, (1 + number) / (10 + number))
        average = kept * average + (1 - kept) * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(averaged(state)["w"], average, rtol=1e-5)
    assert_same(state.params, plain.params)  # training itself is not changed
    assert (np.abs(averaged(state)["w"] - state.params["w"]) > 1e-4).any()


def test_the_average_has_the_dtype_of_its_parameters_and_is_kept_in_float32():
    optimizer = make_optimizer(average_recipe(0.9), 30)
    state = init_state({"w": jnp.ones(4, jnp.bfloat16)}, optimizer)
    assert averaged(state)["w"].dtype == jnp.bfloat16
    assert jnp.dtype("float32") in {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)}


def test_a_step_that_is_not_finite_leaves_the_average(tmp_path):
    state, step = start(0.9)
    before = jax.device_get(averaged(state))
    batch = batch_at(0)
    state, metrics = step(state, {**batch, "y": batch["y"] * np.nan})
    assert not np.isfinite(metrics["loss"])
    assert_same(averaged(state), before)


def test_a_resumed_run_has_the_same_average(tmp_path):
    state, step = start(0.9)
    whole = fit(state, step, batch_at, 30)
    fit(start(0.9)[0], step, batch_at, 11, checkpoints=open_checkpoints(tmp_path))
    parts = fit(start(0.9)[0], step, batch_at, 30, checkpoints=open_checkpoints(tmp_path))
    assert_same(averaged(parts), averaged(whole))
    assert np.abs(averaged(parts)["w"] - WEIGHTS).max() < 3
