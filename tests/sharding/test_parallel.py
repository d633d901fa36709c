"""States, batches and processes, on a mesh of one device; test_devices.py has more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.errors import ConfigError
from paligemma_jax.sharding import Layout, make_mesh, put, trace
from paligemma_jax.training import parallel


@pytest.fixture
def layout(gemma2) -> Layout:
    return Layout(make_mesh("fsdp=1", devices=jax.devices()[:1]), gemma2)


def test_without_a_layout_nothing_changes():
    batch = {"tokens": np.zeros((2, 3), np.int32)}
    assert parallel.shard_batch(None, batch) is batch and parallel.host_rows(None, 4) == (0, 1)
    assert put(None, batch) is batch and parallel.step_shardings(None, batch) is None
    assert parallel.shard_state(None, lambda params: [params], batch) == [batch]


@pytest.mark.parametrize("micro", [False, True])
def test_a_batch_keeps_its_numbers(layout, micro):
    rows = np.arange(24, dtype=np.int32).reshape((2, 4, 3) if micro else (8, 3))
    found = parallel.shard_batch(layout, {"tokens": rows}, micro=micro)["tokens"]
    np.testing.assert_array_equal(found, rows)
    assert found.sharding.spec[0] is None and parallel.host_rows(layout, 8) == (0, 1)


def test_a_part_of_a_batch_points_at_its_own_pictures(layout):
    """The second half of four rows, whose pictures have 4 soft tokens each: those of the first half come before."""
    slots = np.array([[0, 1, -1], [4, 5, -1]], np.int32)
    with pytest.raises(ConfigError, match="batch_size"):  # one device has all rows, and cannot have a half
        parallel.shard_batch(layout, {"image_slots": slots, "pixels": np.zeros((2, 28, 28, 3))}, 1, 2)
    found = parallel.shard_batch(layout, {"image_slots": slots, "pixels": np.zeros((2, 28, 28, 3))}, 1, 1)
    np.testing.assert_array_equal(found["image_slots"], [[8, 9, -1], [12, 13, -1]])


def test_quantized_weights_are_placed_part_by_part(layout):
    weight = ops.quantize(jnp.arange(64.0).reshape(8, 8), "int8")
    found = layout.place("language_model/layers_0/mlp/up_proj/weight", jax.device_get(weight))
    jax.tree.map(np.testing.assert_array_equal, found, weight)
    assert all(leaf.sharding.mesh == layout.mesh for leaf in jax.tree.leaves(found))


def test_what_a_function_donates_is_donated_on_a_mesh(layout):
    function = jax.jit(lambda x, state: {"state": state["state"] + x}, donate_argnums=1)
    shapes = jax.ShapeDtypeStruct((4,), jnp.float32), {"state": jax.ShapeDtypeStruct((4,), jnp.float32)}
    traced = trace(layout, function, *shapes)
    x, state = put(layout, (np.ones(4, np.float32), {"state": np.ones(4, np.float32)}))
    result = traced.lower().compile()(x, state)
    assert state["state"].is_deleted() and not x.is_deleted()
    np.testing.assert_array_equal(result["state"], 2)


def test_processes_that_cannot_be_joined_are_one_line(monkeypatch):
    def fail(**given):
        raise RuntimeError("jax.distributed.initialize must be called before any JAX calls")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match="cannot be joined"):
        parallel.connect("localhost:1", 2, 0)
    parallel.connect("", 1, 0)
