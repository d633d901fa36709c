"""A least-squares problem that trains in milliseconds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paligemma_jax.training.step import init_state, make_step

WEIGHTS = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
OPTIMIZER = optax.adam(0.05)


def batch_at(step):
    x = np.random.default_rng(step).normal(size=(16, 4)).astype(np.float32)
    return {"x": x, "y": x @ WEIGHTS}


def loss_fn(params, batch):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(error**2), {"off": jnp.mean(jnp.abs(error))}


STEP = make_step(loss_fn, OPTIMIZER)


def start(size=4, optimizer=OPTIMIZER):
    return init_state({"w": jnp.zeros(size), "b": jnp.zeros(())}, optimizer)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Recorder:
    """A logger that keeps what it is told: `told` pairs of step and numbers, `started` the calls of `start`."""

    def __init__(self):
        self.told, self.shown, self.started, self.closed = [], [], [], 0

    def start(self, step, validated):
        self.started.append((step, validated))

    def numbers(self, step, values):
        self.told.append((step, values))

    def samples(self, step, samples):
        self.shown.append((step, list(samples)))

    def close(self):
        self.closed += 1

    def losses(self):
        return [values["loss"] for _, values in self.told if "loss" in values]
