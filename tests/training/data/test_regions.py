"""Outlines of objects: polygons, run lengths and decoded codes are the same mask."""

import json

import jax
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from paligemma_jax.checkpoints.mask_vae import load_mask_vae, save_mask_vae
from paligemma_jax.errors import CheckpointError, DataError
from paligemma_jax.models import mask_vae
from paligemma_jax.tasks.detection import parse
from paligemma_jax.tasks.run_lengths import Runs, decode_runs, read_counts
from paligemma_jax.tasks.segmentation import crop_mask
from paligemma_jax.training.data import open_data
from paligemma_jax.training.data.masks import MaskCodec
from paligemma_jax.training.data.regions import Grid, cells
from tests.training.data import worlds


def _disc(height, width):
    rows, columns = np.mgrid[:height, :width]
    return ((columns - 30) / 18) ** 2 + ((rows - 22) / 12) ** 2 < 1


@pytest.mark.parametrize("kind", ["empty", "full", "disc", "noise"])
def test_run_lengths_are_those_of_coco(kind):
    shape = (37, 61)
    mask = {"empty": np.zeros(shape), "full": np.ones(shape), "disc": _disc(*shape)}.get(kind)
    mask = np.random.default_rng(0).random(shape) < 0.3 if mask is None else mask.astype(bool)
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    runs = Runs(read_counts(encoded["counts"].decode()), *shape)
    np.testing.assert_array_equal(decode_runs(runs), mask)
    with pytest.raises(DataError, match="run lengths do not fill a mask of 61 x 36"):
        decode_runs(Runs(runs.counts, 36, 61))


def test_run_lengths_that_end_too_early():
    with pytest.raises(DataError, match="end too early"):
        read_counts("0a")


def test_all_outlines_are_the_same_mask():
    """A polygon, run lengths and a grid that spans the picture, cut to one box."""
    mask = np.zeros((48, 64), bool)
    mask[10:30, 8:40] = True
    polygon = np.array([[8, 10], [40, 10], [40, 30], [8, 30]]) / (64, 48)
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    for corners in ((8, 10, 40, 30), (4, 6, 44, 34), (20, 5, 60, 45)):
        box = tuple(v / side for v, side in zip(corners, (64, 48, 64, 48), strict=True))
        expected = crop_mask(mask, corners)
        np.testing.assert_allclose(cells(Runs(counts, 48, 64), box), expected, atol=1e-5)
        np.testing.assert_allclose(cells((polygon,), box), expected, atol=0.51)
        assert abs(cells((polygon,), box) - expected).mean() < 0.04
    square = np.zeros((64, 64), bool)
    square[:, 16:] = True
    np.testing.assert_allclose(cells(Grid(square, (0.2, 0.2, 0.6, 0.6)), (0.35, 0.2, 0.6, 0.6)), 1.0, atol=1e-5)


def test_two_polygons_of_an_object_are_joined():
    left = np.array([[0, 0], [0.25, 0], [0.25, 1], [0, 1]])
    mask = cells((left, left + np.array([0.75, 0])), (0, 0, 1, 1))
    np.testing.assert_allclose(mask.mean(0), [1] * 16 + [0] * 32 + [1] * 16, atol=0.13)


@pytest.fixture(scope="module")
def codec():
    config = mask_vae.MaskVAEConfig((4, 4, 4, 4), (4, 4, 4, 4, 4), 8)
    return MaskCodec(lambda: mask_vae.init_params(jax.random.key(0), config))


def test_codes_do_not_depend_on_how_many_are_encoded_at_once(codec):
    masks = np.random.default_rng(0).random((11, 64, 64)).astype(np.float32)
    together = codec.encode(masks)
    assert together.shape == (11, 16) and together.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([codec.encode(mask[None]) for mask in masks]), together)
    np.testing.assert_array_equal(codec.encode(masks[::-1])[::-1], together)
    assert codec.decode(together).shape == (11, 64, 64)
    assert codec.encode(masks[:0]).shape == (0, 16) and codec.decode(together[:0]).shape == (0, 64, 64)


@pytest.mark.parametrize("form", ["coco", "yolo polygons"])
def test_outlines_become_codes(form, tmp_path, codec):
    """Those of the filled box, as the outlines of these data are their boxes; worked out once."""
    folder = worlds.WRITERS[form](tmp_path)
    calls = []

    def encode(masks):
        calls.append(len(masks))
        return codec.encode(masks)

    examples = open_data(folder, task="segment", encode=encode)
    full = codec.encode(np.ones((1, 64, 64), np.float32))[0].tolist()
    for example, draft, plain in zip(examples, map(examples.draft, range(3)), open_data(folder), strict=True):
        assert example.prefix == worlds.PREFIX.replace("detect", "segment")
        found = parse(example.suffix, (1, 1))[0]
        assert [item.box for item in found] == [item.box for item in parse(plain.suffix, (1, 1))[0]]
        assert all(list(item.codes) == full for item in found)
        assert len(draft.suffix) == len(example.suffix)
    assert list(examples) and calls == [2, 3]


def test_objects_without_an_outline_cannot_be_segmented(tmp_path, codec):
    with pytest.raises(DataError, match="object 'cat' without an outline, and data_task=segment needs one"):
        open_data(worlds.write_voc(tmp_path), task="segment", encode=codec.encode)


def test_run_lengths_in_a_file(tmp_path, codec):
    folder = worlds.write_coco(tmp_path)
    mask = np.zeros((48, 64), np.uint8)
    mask[6:30, 4:12] = 1  # the left half of the cat's box
    encoded = coco_mask.encode(np.asfortranarray(mask))
    value = worlds.coco()
    path = folder / "train" / "_annotations.coco.json"
    cells_seen = []
    for counts in (encoded["counts"].decode(), [4 * 48 + 6, *([24, 24] * 8)[:-1], 18 + 52 * 48]):
        value["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": counts}
        path.write_text(json.dumps(value))
        examples = open_data(
            folder, task="segment", encode=lambda masks: cells_seen.append(masks) or codec.encode(masks)
        )
        assert len(examples[0].suffix) > 100
    for masks in cells_seen:
        np.testing.assert_allclose(masks[0][4:-4, 4:28], 1, atol=1e-5)
        np.testing.assert_allclose(masks[0][:, 36:], 0, atol=1e-5)
    value["annotations"][0]["segmentation"]["size"] = [40, 64]
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="has a mask of 64 x 40 and is 64 x 48"):
        open_data(folder, task="segment", encode=codec.encode)


def test_a_file_with_a_decoder_alone_is_refused(tmp_path):
    config = mask_vae.MaskVAEConfig((4, 4, 4, 4), (4, 4, 4, 4, 4), 8)
    save_mask_vae(tmp_path / "vae.npz", mask_vae.init_params(jax.random.key(0), config))
    with np.load(tmp_path / "vae.npz") as file:
        arrays = {name: file[name] for name in file.files if not name.startswith("encoder")}
    np.savez(tmp_path / "decoder.npz", **arrays)
    codec = MaskCodec(lambda: load_mask_vae(tmp_path / "decoder.npz"))
    with pytest.raises(CheckpointError, match=r"encoder\.0"):
        codec.encode(np.zeros((1, 64, 64), np.float32))
