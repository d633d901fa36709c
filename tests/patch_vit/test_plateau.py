import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit.plateau import Recipe, after_validation, make_optimizer

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "scale": jnp.array([2.0])}


def optimizer(recipe):
    return make_optimizer(recipe, lambda params: {name: name != "scale" for name in params})


def rates(recipe, losses):
    state = optimizer(recipe).init(PARAMS)
    found = []
    for loss in losses:
        state = after_validation(recipe, state, loss)
        found.append(round(float(state.learning_rate), 9))
    return found


def test_updates_are_adamw_s_in_float64():
    recipe = Recipe(learning_rate=0.01, weight_decay=0.1)
    adamw, params = optimizer(recipe), PARAMS
    state = adamw.init(params)
    w, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for step in range(1, 6):
        g = np.array([0.5, -1.0, 2.0]) / step
        updates, state = adamw.update({"w": jnp.asarray(g), "scale": jnp.array([1.0])}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        w = w - 0.01 * (direction + 0.1 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-6)
    assert float(params["scale"][0]) == 2.0


def test_the_rate_falls_after_patience_and_counts_anew():
    losses = [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert rates(Recipe(), losses) == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4, 2.5e-4, 1.25e-4]


def test_a_little_better_is_not_better():
    assert rates(Recipe(), [1.0, 0.9995, 0.9991])[-1] == 5e-4
    assert rates(Recipe(), [1.0, 0.998, 0.9965])[-1] == 1e-3


def test_the_rate_has_a_least():
    assert rates(Recipe(min_learning_rate=4e-4), [1.0] * 9)[-1] == 4e-4


def test_impossible_settings_are_refused():
    for change in ({"plateau_factor": 0.0}, {"learning_rate": -1.0}, {"weight_decay": float("nan")}):
        with pytest.raises(ConfigError, match="is not possible"):
            Recipe(**change)
