"""Projections of one input as one weight: in trees, in quantized files, and taken apart for other formats."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from paligemma_jax import checkpoints, ops
from paligemma_jax.checkpoints import big_vision, mapping, quantized, tensor_files
from paligemma_jax.checkpoints.huggingface import key_of
from paligemma_jax.errors import CheckpointError

PARTS = {
    "self_attn/qkv_proj": ["self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"],
    "mlp/gate_up_proj": ["mlp/gate_proj", "mlp/up_proj"],
}


def fused(params):
    """A plain tree with fused projections, by a formula of its own."""
    flat = dict(flatten_dict(params, sep="/"))
    for i in range(3):
        for whole, parts in PARTS.items():
            paths = [f"language_model/layers_{i}/{part}/weight" for part in parts]
            flat[f"language_model/layers_{i}/{whole}/weight"] = np.concatenate([flat.pop(path) for path in paths])
    return unflatten_dict(flat, sep="/")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def unfuse_file(directory, config):
    """Write a quantized checkpoint as earlier versions did, a weight for each name of the geometry."""
    path = directory / "model.safetensors"
    tensors, shapes = dict(load_file(path)), checkpoints.expected_shapes(config)
    for name in list(tensors):
        match = re.fullmatch(r"(.*layers\.(\d+)\.)(self_attn\.qkv_proj|mlp\.gate_up_proj)(\.weight.*)", name)
        if match is None:
            continue
        rows, start = tensors.pop(name), 0
        for part in PARTS[match[3].replace(".", "/")]:
            stop = start + shapes[f"language_model/layers_{match[2]}/{part}/weight"][0]
            tensors[match[1] + part.replace("/", ".") + match[4]] = rows[start:stop].copy()
            start = stop
        assert start == len(rows)
    tensor_files.write(path, tensors)


@pytest.fixture(params=["int8", "int4"])
def written(request, checkpoint, tmp_path):
    """A quantized checkpoint that was written here, and the parameters it was written from."""
    config, params = checkpoints.load(checkpoint(), quantization=request.param)
    checkpoints.save(tmp_path / "written", config, params)
    return checkpoints.scan(tmp_path / "written"), params


def test_fused_shapes_are_those_of_the_parts_together(config):
    shapes, expected = checkpoints.fused_shapes(config), checkpoints.expected_shapes(config)
    D, H, N, K = config.text.width, config.text.head_dim, config.text.num_heads, config.text.num_kv_heads
    for i in range(config.text.num_layers):
        layer = f"language_model/layers_{i}"
        assert shapes[f"{layer}/self_attn/qkv_proj/weight"] == ((N + 2 * K) * H, D)
        assert shapes[f"{layer}/mlp/gate_up_proj/weight"] == (2 * config.text.mlp_dim, D)
    apart = {path: shape for path, shape in shapes.items() if not re.search("qkv_proj|gate_up_proj", path)}
    assert apart.items() <= expected.items() and len(expected) == len(shapes) + 3 * config.text.num_layers
    assert len(shapes) == len(apart) + 2 * config.text.num_layers


def test_quantized_checkpoints_are_written_and_read_fused(written, tmp_path):
    contents, params = written
    assert {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()} == checkpoints.fused_shapes(
        contents.config
    )
    assert set(contents.tensors) == set(checkpoints.fused_shapes(contents.config))
    config, loaded = checkpoints.load(contents)
    same(loaded, params)
    checkpoints.save(tmp_path / "again", config, loaded)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (contents.directory / name).read_bytes()


def test_fused_weights_hold_the_rows_of_their_parts_each_quantized_by_itself(checkpoint, params):
    _, loaded = checkpoints.load(checkpoint(), "float32", quantization="int4")
    for i in range(3):
        for whole, parts in PARTS.items():
            module, name = whole.split("/")
            layer, found = params["language_model"][f"layers_{i}"][module], loaded["language_model"][f"layers_{i}"]
            rows = [ops.quantize(jax.numpy.asarray(layer[part.split("/")[1]]["weight"]), "int4") for part in parts]
            weight = found[module][name]["weight"]
            for field in ("values", "scale", "group_scale"):
                expected = np.concatenate([getattr(part, field) for part in rows])
                np.testing.assert_array_equal(getattr(weight, field), expected)


def test_projections_are_read_apart_where_several_devices_need_them(written, checkpoint):
    """Fused in the file, or quantized while they are read; no number changes."""
    contents, fused = written
    quantization = contents.quantization
    for source, now in ((contents, None), (checkpoints.scan(checkpoint()), quantization)):
        _, apart = checkpoints.load(source, quantization=now, fuse=False)
        same(apart, ops.unprepare(fused))
        shapes = checkpoints.abstract(source, "bfloat16", now, fuse=False)
        assert jax.tree.structure(shapes) == jax.tree.structure(apart)


def test_quantized_files_of_earlier_versions_load_and_are_written_fused(written, tmp_path):
    contents, params = written
    bytes_before = (contents.directory / "model.safetensors").read_bytes()
    unfuse_file(contents.directory, contents.config)
    old = checkpoints.scan(contents.directory)
    assert set(old.tensors) == set(checkpoints.expected_shapes(contents.config))
    config, loaded = checkpoints.load(old)
    same(ops.unprepare(params), loaded)
    checkpoints.save(tmp_path / "again", config, loaded)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == bytes_before


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("earlier", [False, True])
def test_shapes_are_known_before_loading(checkpoint, tmp_path, quantization, earlier):
    config, params = checkpoints.load(checkpoint(), quantization=quantization)
    checkpoints.save(tmp_path, config, params)
    if earlier and quantization:
        unfuse_file(tmp_path, config)
    for directory, name in ((checkpoint(), quantization), (tmp_path, None), (tmp_path, quantization)):
        contents = checkpoints.scan(directory)
        expected, (_, found) = (
            checkpoints.abstract(contents, "bfloat16", name),
            checkpoints.load(contents, quantization=name),
        )
        assert jax.tree.structure(expected) == jax.tree.structure(found)
        for before, after in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
            assert (before.shape, before.dtype) == (after.shape, after.dtype)


@pytest.mark.parametrize("shards", [1, 3])
def test_plain_checkpoints_are_always_written_with_the_names_of_hugging_face(
    tmp_path, config, params, shards, assert_same
):
    limit = 2_000_000_000 if shards == 1 else 10_000
    for name, tree in (("apart", params), ("fused", fused(params))):
        checkpoints.huggingface.save(tmp_path / name, config, tree, max_shard_bytes=limit)
    files = sorted((tmp_path / "apart").iterdir())
    assert len(files) > 2 * (shards > 1)
    for file in files:
        assert file.read_bytes() == (tmp_path / "fused" / file.name).read_bytes()
    assert_same(checkpoints.load(tmp_path / "fused", dtype=None)[1], params)


def test_a_plain_file_with_fused_weights_loads(tmp_path, config, params, assert_same):
    checkpoints.save(tmp_path, config, params)
    flat = flatten_dict(fused(params), sep="/")
    tensor_files.write(tmp_path / "model.safetensors", {key_of(path, config.version): x for path, x in flat.items()})
    assert_same(checkpoints.load(tmp_path, dtype=None)[1], fused(params))
    quantized_tree = checkpoints.load(tmp_path, quantization="int8")[1]
    checkpoints.save(tmp_path / "apart", config, params)
    same(quantized_tree, checkpoints.load(tmp_path / "apart", quantization="int8")[1])


def test_a_fused_tree_becomes_the_same_npz(tmp_path, config, params):
    for name, tree in (("apart.npz", params), ("fused.npz", fused(params))):
        big_vision.save(tmp_path / name, config, tree)
    apart, whole = (np.load(tmp_path / name) for name in ("apart.npz", "fused.npz"))
    assert apart.files == whole.files
    for key in apart.files:
        np.testing.assert_array_equal(apart[key], whole[key])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_npz_is_quantized_and_fused_like_a_directory(tmp_path, checkpoint, config, params, quantization):
    big_vision.save(tmp_path / "model.npz", config, params)
    _, found = checkpoints.load(tmp_path / "model.npz", config=config, quantization=quantization)
    same(found, checkpoints.load(checkpoint(), quantization=quantization)[1])


def test_fused_weights_stay_in_the_pages_of_their_file(checkpoint, tmp_path, monkeypatch):
    config, params = checkpoints.load(checkpoint(), quantization="int8")
    checkpoints.save(tmp_path, config, params)
    monkeypatch.setattr(tensor_files, "_LARGE", 16)
    monkeypatch.setattr(tensor_files, "ALIGNMENT", 1)  # small weights have odd sizes
    mapped = []

    def place(path, leaf):
        if isinstance(leaf, ops.Int8):
            mapped.append(
                any(np.shares_memory(leaf.values, np.frombuffer(p, np.uint8)) for p in mapping._MAPPINGS.values())
            )
        return leaf

    checkpoints.load(tmp_path, place=place)
    assert mapped and all(mapped)


@pytest.mark.parametrize("rows", [slice(1, None), slice(None, -1)], ids=["first", "last"])
def test_a_mis_shaped_fused_weight_is_named(tmp_path, config, params, rows):
    tree = fused(params)
    mlp = tree["language_model"]["layers_0"]["mlp"]["gate_up_proj"]
    mlp["weight"] = mlp["weight"][rows]
    for save, name in ((checkpoints.save, "out"), (big_vision.save, "out.npz")):
        with pytest.raises(
            CheckpointError, match=r"mis-shaped: .*gate_up_proj/weight is \[55, 20\] instead of \[56, 20\]"
        ):
            save(tmp_path / name, config, tree)


def test_a_weight_both_fused_and_in_parts_is_refused(tmp_path, config, params):
    tree = fused(params)
    tree["language_model"]["layers_0"]["mlp"]["up_proj"] = params["language_model"]["layers_0"]["mlp"]["up_proj"]
    with pytest.raises(CheckpointError, match="1 unexpected: language_model/layers_0/mlp/up_proj/weight"):
        checkpoints.save(tmp_path, config, tree)


def test_parts_that_are_not_quantized_alike_stay_apart(checkpoint, tmp_path):
    config, plain = checkpoints.load(checkpoint())
    mlp = plain["language_model"]["layers_0"]["mlp"]
    mlp["gate_proj"] = {"weight": ops.quantize(mlp["gate_proj"]["weight"], "int8")}
    attention = plain["language_model"]["layers_1"]["self_attn"]
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = ops.quantize(attention[name]["weight"], "int8")
        values = ops.with_zero_point(weight.values, np.dtype(np.uint8 if name == "k_proj" else np.int8))
        attention[name] = {"weight": dataclasses.replace(weight, values=values)}
    checkpoints.save(tmp_path, config, plain)
    same(checkpoints.load(tmp_path)[1], plain)
    assert quantized.format_of("language_model/layers_0/mlp/gate_up_proj/weight", "int4") == "int4"


def test_quantized_trees_are_no_npz(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), quantization="int8")
    with pytest.raises(CheckpointError, match="holds no quantized weights: write a directory"):
        big_vision.save(tmp_path / "model.npz", config, params)
