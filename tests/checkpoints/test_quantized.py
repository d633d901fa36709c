"""Quantized weights in files."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax import checkpoints, ops
from paligemma_jax.checkpoints import quantized, tensor_files
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.ops import selection


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("max_shard_bytes", [2_000_000_000, 20_000])
def test_written_and_read_again(checkpoint, tmp_path, name, max_shard_bytes):
    config, params = checkpoints.load(checkpoint(), "bfloat16", quantization=name)
    checkpoints.huggingface.save(tmp_path, config, params, max_shard_bytes=max_shard_bytes)
    contents = checkpoints.scan(tmp_path)
    assert contents.quantization == name and set(contents.dtypes) == {name, "int8", "bfloat16"}
    again, loaded = checkpoints.load(contents, "bfloat16")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=ops.is_weight):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert ops.is_weight(leaf) == (quantized.format_of(path, "int8") is not None), path
        if ops.is_weight(leaf):
            decoder = path.startswith("language_model/")
            assert leaf.quantize_activations == decoder and leaf.quantization == (name if decoder else "int8"), path


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_weights_of_the_decoder_are_padded_for_many_rows_and_written_as_they_were(
    checkpoint, tmp_path, monkeypatch, quantization
):
    monkeypatch.setattr(selection, "_padding", lambda weight, target: 3 * (not hasattr(weight, "quantization")))
    monkeypatch.setattr(ops.Table, "best", lambda self, spec, num_rows: 1.0 if spec.width % 4 == 3 else 2.0)
    contents = checkpoints.scan(checkpoint())
    config, plain = checkpoints.load(contents, "bfloat16", quantization=quantization)
    target, table = ops.Target("cpu", num_rows=5), ops.Table()
    _, params = checkpoints.load(
        contents,
        "bfloat16",
        quantization=quantization,
        place=lambda path, leaf: ops.prepare_leaf(path, jax.device_put(leaf), target, table),
    )
    for path, leaf in flatten_dict(params, sep="/").items():
        assert hasattr(leaf, "padding") == (quantization is None and quantized.format_of(path, "int4") == "int4"), path
        if hasattr(leaf, "padding"):
            assert leaf.values.shape == (leaf.shape[0], leaf.shape[1] + 3) and not leaf.values[:, -3:].any()
    shapes = ops.prepare(checkpoints.abstract(contents, "bfloat16", quantization), target, table)
    jax.tree.map(
        lambda shape, x: np.testing.assert_equal((x.shape, x.dtype), (shape.shape, shape.dtype)), shapes, params
    )
    checkpoints.save(tmp_path, config, params)
    _, again = checkpoints.load(tmp_path, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again, plain)


def test_a_cast_leaves_integers_alone(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), "bfloat16", quantization="int8")
    checkpoints.save(tmp_path, config, params, "float32")
    _, loaded = checkpoints.load(tmp_path, "float32")
    table, before = (tree["language_model"]["embed_tokens"]["weight"] for tree in (loaded, params))
    assert table.dtype == np.float32 and table.values.dtype == np.int8
    np.testing.assert_array_equal(table.values, before.values)
    np.testing.assert_array_equal(table.scale, before.scale)


def test_quantized_twice_is_refused(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), quantization="int8")
    checkpoints.save(tmp_path, config, params)
    with pytest.raises(ConfigError, match="is int8 already: leave quantization='int4' out"):
        checkpoints.load(tmp_path, quantization="int4")
    with pytest.raises(ConfigError, match="'int3' is unknown: use int8 or int4"):
        checkpoints.load(tmp_path, quantization="int3")
    checkpoints.load(tmp_path, quantization="int8")


def rewrite(directory, change):
    """Apply `change` to the tensors of a checkpoint of one file."""
    path = directory / "model.safetensors"
    tensors = {name: tensor_files.read(tensor) for name, tensor in tensor_files.read_header(path).items()}
    change(tensors)
    tensor_files.write(path, tensors)


@pytest.mark.parametrize("unsigned", [True, False])
def test_files_may_hold_signed_or_unsigned_numbers(checkpoint, tmp_path, unsigned):
    config, params = checkpoints.load(checkpoint(), quantization="int8")
    checkpoints.save(tmp_path, config, params)
    table = ops.Table({"zero point of 8-bit weights": {"int8": 1.0, "uint8": 1.0 if unsigned else 9.0}})

    def load():
        def place(path, leaf):
            return ops.prepare_leaf(path, jax.device_put(leaf), ops.Target("cpu"), table)

        return checkpoints.load(tmp_path, place=place)[1]

    def flip(tensors):
        names = [name for name, numbers in tensors.items() if numbers.dtype == np.int8]
        assert names
        for name in names:
            tensors[name] = (tensors[name].astype(np.int16) + 128).astype(np.uint8)

    before = load()
    rewrite(tmp_path, flip)
    after = load()
    jax.tree.map(np.testing.assert_array_equal, after["language_model"], before["language_model"])
    table = after["language_model"]["embed_tokens"]["weight"]
    assert table.values.dtype == (np.uint8 if unsigned else np.int8)
    signed = [jax.tree.map(ops.dequantize, tree, is_leaf=ops.is_weight) for tree in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *signed)


TABLE = "language_model.model.embed_tokens.weight"
DAMAGE = {
    "weight_packed": ("weight_scale has no weight beside it", lambda t: t.pop(f"{TABLE}_packed")),
    "weight_scale": ("missing", lambda t: t.pop(f"{TABLE}_scale")),
    "short scale": ("weight_scale is F32", lambda t: t.update({f"{TABLE}_scale": t[f"{TABLE}_scale"][1:]})),
    "wrong type": ("weight_packed is I8", lambda t: t.update({f"{TABLE}_packed": t[f"{TABLE}_packed"].view(np.int8)})),
    "odd groups": (
        "groups, which do not divide half a row",
        lambda t: t.update({f"{TABLE}_multiplier": np.ones((len(t[f"{TABLE}_scale"]), 77), np.int8)}),
    ),
}


@pytest.mark.parametrize("message, change", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(checkpoint, tmp_path, message, change):
    config, params = checkpoints.load(checkpoint(), quantization="int4")
    checkpoints.save(tmp_path, config, params)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.scan(tmp_path)


def test_config_json_says_who_reads_it(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), quantization="int4")
    checkpoints.save(tmp_path, config, params)
    note = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert note == {"quant_method": "paligemma_jax", "bits": 4}


@pytest.mark.parametrize("name", [None, "int8", "int4"])
@pytest.mark.parametrize("written", [False, True])
def test_the_shapes_of_a_load_are_known_before_it(checkpoint, tmp_path, name, written):
    directory = checkpoint()
    config, params = checkpoints.load(directory, quantization=name)
    if written:
        checkpoints.save(tmp_path, config, params)
        directory = tmp_path
    expected = checkpoints.abstract(checkpoints.scan(directory), "bfloat16", None if written else name)
    assert jax.tree.structure(expected) == jax.tree.structure(params)
    for before, after in zip(*map(jax.tree.leaves, (expected, params)), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
