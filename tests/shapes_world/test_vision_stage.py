import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.config import VisionConfig
from paligemma_jax.shapes_world.scenes import COLORS, MAX_OBJECTS, SHAPES
from paligemma_jax.shapes_world.vision_stage import (
    RELATIONS,
    DenseBatches,
    DenseModel,
    count_and_rank,
    dense_loss,
    dense_losses,
    dense_targets,
    mimetic_init,
    normalize,
    sinusoidal_positions,
)
from paligemma_jax.training.logs import JsonLines
from paligemma_jax.training.loop import fit
from paligemma_jax.training.step import init_state, make_step

CONFIG = VisionConfig(image_size=28, patch_size=7, width=16, num_layers=2, mlp_dim=24, num_heads=2)


@pytest.fixture(scope="module")
def model():
    return DenseModel(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    inputs = (jnp.zeros((1, 28, 28, 3)), jnp.zeros((1, MAX_OBJECTS), jnp.int32))
    return jax.jit(model.init)(jax.random.key(0, impl="rbg"), *inputs)["params"]


def test_targets_say_what_covers_each_patch_most(pool, codes):
    found = dense_targets(pool, codes[0])
    count, rank = count_and_rank(pool)
    for row, patch in np.ndindex(len(pool["shape"]), 16):
        shares = pool["coverage"][row, :, patch] / 255
        owner = int(np.argmax(shares))
        there = shares[owner] >= 0.03
        assert found["foreground"][row, patch] == there
        assert found["supervised"][row, patch] == (there or shares[owner] < 0.005)
        assert found["shape"][row, patch] == (pool["shape"][row, owner] if there else len(SHAPES))
        assert found["color"][row, patch] == (pool["color"][row, owner] if there else len(COLORS))
        if there:
            np.testing.assert_array_equal(found["box"][row, patch], pool["box"][row, owner])
            np.testing.assert_array_equal(found["count"][row, patch], count[row, owner])
            np.testing.assert_array_equal(found["rank"][row, patch], rank[row, owner])
    assert found["foreground"].any(axis=1).all() and not found["supervised"].all()


def test_codes_belong_to_the_patch_at_the_middle_of_the_box(pool, codes):
    found = dense_targets(pool, codes[0])
    for row, place in np.ndindex(pool["shape"].shape):
        if pool["shape"][row, place] < 0:
            assert (found["codes"][row, place] == -1).all()
            continue
        y0, x0, y1, x1 = pool["box"][row, place]
        assert found["centre"][row, place] == int((y0 + y1) / 2 * 4) * 4 + int((x0 + x1) / 2 * 4)
        np.testing.assert_array_equal(found["codes"][row, place], codes[0, row, place])
    assert (pool["shape"] < 0).any()


def test_standing_counts_one_by_one(pool):
    count, rank = count_and_rank(pool)
    alike = {
        "any": lambda a, b: True,
        "same shape": lambda a, b: a[0] == b[0],
        "same color": lambda a, b: a[1] == b[1],
        "same shape and color": lambda a, b: a == b,
    }
    assert tuple(alike) == RELATIONS
    for row in range(len(pool["shape"])):
        things = [
            ((int(s), int(c)), float(box[1]))
            for s, c, box in zip(pool["shape"][row], pool["color"][row], pool["box"][row], strict=True)
            if s >= 0
        ]
        for i, (kind, left) in enumerate(things):
            for r, like in enumerate(alike.values()):
                others = [x for j, (other, x) in enumerate(things) if j != i and like(kind, other)]
                assert count[row, i, r] == len(others)
                assert rank[row, i, r] == sum(x < left for x in others)
        assert not count[row, len(things) :].any() and not rank[row, len(things) :].any()
    assert (count[..., 3] > 0).any() and (rank[..., 1] > 0).any()


def test_batches_are_a_function_of_the_step(pool, codes):
    batches = DenseBatches(pool, codes, 32, seed=3)
    later, first = batches(7), batches(0)
    for key, values in DenseBatches(pool, codes, 32, seed=3)(7).items():
        np.testing.assert_array_equal(later[key], values)
    assert later["pixels"].shape == (32, 28, 28, 3) and later["pixels"].dtype == np.uint8
    assert (later["pixels"] != first["pixels"]).any()
    assert (DenseBatches(pool, codes, 32, seed=4)(0)["pixels"] != first["pixels"]).any()


@pytest.mark.parametrize("count, width", [(16, 16), (64, 10)])
def test_near_positions_are_alike(count, width):
    table = sinusoidal_positions(count, width)
    assert table.shape == (count, width) and table.dtype == np.float32
    place = np.stack(np.divmod(np.arange(count), round(count**0.5)), axis=1)
    apart = np.linalg.norm(place[:, None] - place[None], axis=-1)
    unlike = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert unlike[apart == 1].mean() < unlike[apart == 2].mean() < unlike[apart > 2].mean()
    assert unlike[apart > 0].min() > 1e-3  # and no two are the same


def test_warm_start_leaves_all_else_alone(params):
    started = jax.jit(mimetic_init)(params)
    changed = set()
    for (path, old), (_, new) in zip(*(jax.tree_util.tree_leaves_with_path(p) for p in (params, started)), strict=True):
        assert old.shape == new.shape
        if (old != new).any():
            changed.add("/".join(key.key for key in path))
    keys = {f"vision_tower/layers_{i}/self_attn/k_proj/weight" for i in (0, 1)}
    assert changed == {"vision_tower/position_embedding/weight", *keys}
    attention = started["vision_tower"]["layers_1"]["self_attn"]
    np.testing.assert_array_equal(attention["k_proj"]["weight"], attention["q_proj"]["weight"])


def test_bytes_become_what_the_processor_gives(processor):
    values = np.arange(256, dtype=np.uint8)
    table = np.asarray(normalize(values))
    np.testing.assert_allclose(table, values / 127.5 - 1, atol=1e-6)
    assert (table[0], table[-1]) == (-1, 1)


def test_right_answers_cost_nothing_and_unclear_patches_do_not_count(pool, codes):
    targets = dense_targets({key: values[:8] for key, values in pool.items()}, codes[0, :8])
    out = {
        "shape": 50 * np.eye(len(SHAPES) + 1, dtype=np.float32)[targets["shape"]],
        "color": 50 * np.eye(len(COLORS) + 1, dtype=np.float32)[targets["color"]],
        "box": targets["box"],
        "count": 50 * np.eye(4, dtype=np.float32)[targets["count"]],
        "rank": 50 * np.eye(4, dtype=np.float32)[targets["rank"]],
        "codes": 50 * np.eye(128, dtype=np.float32)[targets["codes"]],
    }
    measure = jax.jit(dense_losses)
    loss, metrics = measure(out, targets)
    assert loss < 1e-6 and metrics["box_error"] == 0
    assert all(metrics[f"{name}_acc"] == 1 for name in ("shape", "color", "count", "rank", "codes"))
    unclear = {**dict.fromkeys(out, ~targets["supervised"]), "codes": targets["codes"][..., 0] < 0}
    assert all(where.any() for where in unclear.values())
    noisy = {
        key: np.where(unclear[key].reshape(*unclear[key].shape, *(1,) * (values.ndim - 2)), -values, values)
        for key, values in out.items()
    }
    assert measure(noisy, targets)[0] == pytest.approx(float(loss))
    for name in ("count", "rank", "codes"):
        assert measure({**out, name: -out[name]}, targets)[0] > loss + 1
    moved = {**out, "box": out["box"] + 0.05}
    worse, metrics = measure(moved, targets)
    assert worse > loss and metrics["box_error"] == pytest.approx(0.05, abs=1e-6)


@pytest.mark.slow
def test_the_encoder_learns_what_patches_show(model, params, pool, codes, capsys, tmp_path):
    few = {key: values[:8] for key, values in pool.items()}
    file = tmp_path / "metrics.jsonl"
    optimizer = optax.adam(1e-2)
    fit(
        init_state(jax.tree.map(jnp.copy, params), optimizer),
        make_step(functools.partial(dense_loss, model), optimizer),
        DenseBatches(few, codes[:, :8], 8),
        300,
        log_every=100,
        loggers=[JsonLines(file)],
    )
    history = [json.loads(line) for line in file.read_text().splitlines()]
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"]
    assert min(history[2][f"{name}_acc"] for name in ("shape", "color", "count", "rank", "codes")) > 0.8
    assert "train 300/300" in capsys.readouterr().err
