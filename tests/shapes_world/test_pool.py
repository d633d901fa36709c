import concurrent.futures

import numpy as np
import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.shapes_world import pool as pools
from paligemma_jax.shapes_world.pool import (
    epoch_rows,
    mirror,
    mixed_scene_at,
    scene_pool,
    scene_record,
    take,
    turn,
    view_index,
    views,
)
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES, masks, scene_at, unit_mask


def test_records_say_what_the_scene_holds(scenes, pool):
    for i, scene in enumerate(scenes):
        count = len(scene.shapes)
        kinds = zip(pool["color"][i, :count], pool["shape"][i, :count], strict=True)
        assert [(COLORS[c], SHAPES[s]) for c, s in kinds] == [shape.kind for shape in scene.shapes]
        assert (pool["color"][i, count:] == -1).all() and (pool["shape"][i, count:] == -1).all()
        assert not pool["box"][i, count:].any() and not pool["mask"][i, count:].any()
        x0, y0, x1, y1 = np.array([shape.box for shape in scene.shapes]).T
        width, height = scene.size
        expected = np.stack([y0 / height, x0 / width, y1 / height, x1 / width], axis=1)
        np.testing.assert_allclose(pool["box"][i, :count], expected, rtol=1e-6)
        for k, shape in enumerate(scene.shapes):
            unpacked = np.unpackbits(pool["mask"][i, k]).reshape(64, 64)
            np.testing.assert_array_equal(unpacked, unit_mask(shape) >= 0.5)


def test_coverage_is_the_share_of_each_patch(scenes):
    for scene in scenes[:20]:
        covered = scene_record(scene, 32, 8)["coverage"][: len(scene.shapes)] / 255
        exact = masks(scene)
        width, height = scene.size
        for share, mask in zip(covered, exact, strict=True):
            assert share.mean() == pytest.approx(mask.mean(), abs=0.03)
            rows, columns = np.nonzero(mask)
            counts = np.zeros((4, 4))
            cell = ((rows + 0.5) * 4 / height).astype(int), ((columns + 0.5) * 4 / width).astype(int)
            np.add.at(counts, cell, 16 / (width * height))
            off = np.abs(share.reshape(4, 4) - counts)
            assert off.max() < 0.25 and off.mean() < 0.03  # PIL's polygons are up to half a subpixel too wide


def batch(pool, mirrored):
    return take(pool, np.arange(len(mirrored)), np.array(mirrored))


def test_mirroring_twice_changes_nothing(pool):
    chosen = np.arange(20) % 2 == 0
    once = batch(pool, chosen)
    plain, twice = batch(pool, [False] * 20), mirror(once, chosen)
    for key, values in plain.items():
        np.testing.assert_allclose(twice[key], values, atol=1e-6)
        np.testing.assert_array_equal(once[key][1::2], values[1::2])
    assert (once["pixels"] != plain["pixels"]).any() and (once["coverage"] != plain["coverage"]).any()


def test_labels_turn_with_the_pixels(pool):
    plain, turned = batch(pool, [False] * 40), batch(pool, [True] * 40)
    np.testing.assert_array_equal(turned["pixels"], plain["pixels"][:, :, ::-1])
    grids = [record["coverage"].reshape(40, -1, 4, 4) for record in (plain, turned)]
    np.testing.assert_array_equal(grids[1], grids[0][..., ::-1])
    for record in (plain, turned):
        y0, x0, y1, x1 = np.moveaxis(record["box"], -1, 0)[..., None]
        there = record["shape"][..., None] >= 0
        low, high = np.arange(4) / 4 - 1 / 32, (np.arange(4) + 1) / 4 + 1 / 32  # a pixel that `coverage` drew
        columns, rows = (record["coverage"].reshape(40, -1, 4, 4).max(axis=axis) > 0 for axis in (2, 3))
        assert ((x0 < high) & (x1 > low))[columns & there].all()
        assert ((y0 < high) & (y1 > low))[rows & there].all()
        assert (x0 < x1)[there].all()


def test_turning_the_pixels_turns_the_labels(pool):
    plain, turns = batch(pool, [False] * 40), np.arange(40) % 4
    turned = turn(plain, turns)
    for i, quarters in enumerate(turns):
        np.testing.assert_array_equal(turned["pixels"][i], np.rot90(plain["pixels"][i], quarters))
        for k in np.flatnonzero(plain["shape"][i] >= 0):
            grid = plain["coverage"][i, k].reshape(4, 4)
            np.testing.assert_array_equal(turned["coverage"][i, k].reshape(4, 4), np.rot90(grid, quarters))
            y0, x0, y1, x1 = plain["box"][i, k]
            y, x = np.mgrid[:200, :200] / 200 + 1 / 400
            inside = np.rot90((y > y0) & (y < y1) & (x > x0) & (x < x1), quarters)
            rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
            found = rows[0] / 200, columns[0] / 200, (rows[-1] + 1) / 200, (columns[-1] + 1) / 200
            np.testing.assert_allclose(turned["box"][i, k], found, atol=0.006)
    assert not turned["box"][turned["shape"] < 0].any()
    again = turn(turned, (4 - turns) % 4)
    for key, values in plain.items():
        np.testing.assert_allclose(again[key], values, atol=1e-6)


def test_views_are_masks_as_they_are_mirrored_and_turned():
    masks = np.random.default_rng(0).random((3, 8, 8)) < 0.5
    shown = views(masks)
    for mirrored in (False, True):
        for quarters in range(4):
            index = view_index(np.array([mirrored]), np.array([quarters]))[0]
            expected = [np.rot90(mask[:, ::-1] if mirrored else mask, quarters) for mask in masks]
            np.testing.assert_array_equal(shown[index], expected)
    assert len(shown) == 8 and (shown[0] == masks).all() and (shown[1] == masks[..., ::-1]).all()


@pytest.mark.parametrize("share, wide", [(0.0, 0), (0.75, 9), (1.0, 12)])
def test_a_share_of_the_scenes_is_wide(share, wide):
    mixed = [mixed_scene_at(5, index, share) for index in range(12)]
    assert sum(scene.noise > 0 for scene in mixed) == wide


@pytest.mark.parametrize("num_rows, batch_size", [(12, 4), (13, 4), (5, 5)])
def test_an_epoch_shows_each_picture_once(num_rows, batch_size):
    per_epoch = num_rows // batch_size
    epochs = []
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        rows = [epoch_rows(num_rows, batch_size, step, seed=1) for step in steps]
        assert all((np.diff(r) > 0).all() and len(r) == batch_size for r in rows)
        shown = np.concatenate(rows)
        assert len(set(shown.tolist())) == len(shown) and shown.max() < num_rows
        epochs.append(shown.tolist())
    assert num_rows == batch_size or len(set(map(tuple, epochs))) == 3
    again = epoch_rows(num_rows, batch_size, 2 * per_epoch, seed=1)
    np.testing.assert_array_equal(again, epochs[2][:batch_size])


def test_too_few_pictures_are_a_clear_error():
    with pytest.raises(DataError, match="3 pictures do not fill a batch of 4: raise num_scenes"):
        epoch_rows(3, 4, 0, 0)


@pytest.fixture
def drawn(monkeypatch):
    """Chunks of 3 scenes are drawn in this process; counts them."""
    jobs = []

    def draw_chunk(job):
        jobs.append(job)
        return original(job)

    original = pools._draw_chunk
    monkeypatch.setattr(pools, "_CHUNK", 3)
    monkeypatch.setattr(pools, "_draw_chunk", draw_chunk)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *_: concurrent.futures.ThreadPoolExecutor(1))
    return jobs


def test_a_pool_is_drawn_once_and_read_after(tmp_path, drawn):
    first = scene_pool(tmp_path, 5, 7, 28, 7)
    assert len(drawn) == 3
    for i in range(7):
        for key, value in scene_record(scene_at(5, i), 28, 7).items():
            np.testing.assert_array_equal(first[key][i], value)
    again = scene_pool(tmp_path, 5, 7, 28, 7)
    assert len(drawn) == 3 and all((again[key] == values).all() for key, values in first.items())
    other = scene_pool(tmp_path, 6, 7, 28, 7)
    assert len(drawn) == 6 and (other["pixels"] != first["pixels"]).any()
    mixed = scene_pool(tmp_path, 5, 7, 28, 7, 0.5)
    for i in range(7):
        np.testing.assert_array_equal(mixed["pixels"][i], scene_record(mixed_scene_at(5, i, 0.5), 28, 7)["pixels"])
    assert len(drawn) == 9 and (mixed["pixels"] != first["pixels"]).any()


def test_half_a_pool_is_no_pool(tmp_path, drawn, monkeypatch):
    fine = pools._draw_chunk

    def draw_chunk(job):
        if job[1] == 3:
            raise KeyboardInterrupt
        return fine(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pools, "_draw_chunk", draw_chunk)
        scene_pool(tmp_path, 5, 7, 28, 7)
    np.testing.assert_array_equal(
        scene_pool(tmp_path, 5, 7, 28, 7)["pixels"][6], scene_record(scene_at(5, 6), 28, 7)["pixels"]
    )
