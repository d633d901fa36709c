"""Weights of the same inputs, taken as one."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import big_vision, huggingface, packed, safetensors, shapes
from paligemma_jax.checkpoints.joining import separate
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.padded import Padded
from paligemma_jax.models.quantized import Quantized

GROUPS = ["self_attn/q_proj+k_proj+v_proj", "mlp/gate_proj+up_proj"]


@pytest.fixture(autouse=True)
def in_the_order_given(monkeypatch):
    """Odd sizes, as only small weights have, would go elsewhere."""
    monkeypatch.setattr(safetensors, "_ALIGNMENT", 1)


@pytest.fixture(params=[None, "int8", "int4"])
def written(request, checkpoint, tmp_path):
    """A checkpoint written here, in full or in few bits, and its parameters."""
    config, params = checkpoints.load(checkpoint(), "bfloat16", quantization=request.param)
    checkpoints.save(tmp_path, config, params)
    return checkpoints.scan(tmp_path), params


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_files_written_here_are_joined_and_come_apart_again(written, tmp_path):
    contents, params = written
    whole = checkpoints.join(contents)
    layers = contents.config.text.num_layers
    expected = {f"language_model/layers_{i}/{group}/weight" for i in range(layers) for group in GROUPS}
    expected.remove(f"language_model/layers_{layers - 1}/{GROUPS[0]}/weight")  # where prefill wants few queries
    assert {path for path in whole.tensors if "+" in path} == expected
    assert sum(t.nbytes for t in whole.tensors.values()) == sum(t.nbytes for t in contents.tensors.values())
    _, loaded = checkpoints.load(whole, "bfloat16")
    flat = flatten_dict(loaded, sep="/")
    same(separate(flat, contents.config), flatten_dict(params, sep="/"))
    for path, shape in flatten_dict(checkpoints.abstract(whole, "bfloat16"), sep="/").items():
        assert jax.tree.structure(shape) == jax.tree.structure(flat[path]), path
        assert shape.shape == flat[path].shape, path
    checkpoints.save(tmp_path / "again", contents.config, loaded)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (contents.directory / name).read_bytes()


def test_rounded_or_padded_they_are_what_each_would_be(checkpoint, tmp_path, monkeypatch):
    config, params = checkpoints.load(checkpoint(), "bfloat16")
    checkpoints.save(tmp_path, config, params)
    contents = checkpoints.scan(tmp_path)
    for name in ("int8", "int4"):
        apart, whole = (
            checkpoints.load(c, "bfloat16", quantization=name)[1] for c in (contents, checkpoints.join(contents))
        )
        assert isinstance(whole["language_model"]["layers_0"]["mlp"]["gate_proj+up_proj"]["weight"], Quantized)
        same(separate(flatten_dict(whole, sep="/"), config), flatten_dict(apart, sep="/"))
    monkeypatch.setattr(checkpoints, "padding", lambda weight, num_rows: 4 if num_rows > 4 else 0)
    _, whole = checkpoints.load(checkpoints.join(contents), "bfloat16", num_rows=5)
    assert isinstance(whole["language_model"]["layers_0"]["mlp"]["gate_proj+up_proj"]["weight"], Padded)
    checkpoints.save(tmp_path / "again", config, whole)
    same(checkpoints.load(tmp_path / "again", "bfloat16")[1], params)


def test_only_neighbours_are_joined(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), "float32")
    flat = {huggingface.key_of(path, config.version): x for path, x in flatten_dict(params, sep="/").items()}
    checkpoints.save(tmp_path, config, params)

    def joined(keys):
        safetensors.write(tmp_path / "model.safetensors", {key: flat[key] for key in keys})
        found = checkpoints.join(checkpoints.scan(tmp_path)).tensors
        return {path.split("/")[3] for path in found if "+" in path and path.startswith("language_model/layers_0/")}

    assert joined(sorted(flat)) == {"q_proj+v_proj", "gate_proj+up_proj"}  # as transformers writes them: k, o, q, v
    assert joined(sorted(flat, reverse=True)) == {"v_proj+q_proj", "up_proj+gate_proj"}
    assert joined(sorted(flat, key=lambda key: ("up_proj" in key, "k_proj" in key, key))) == {"q_proj+v_proj"}
    contents = checkpoints.join(checkpoints.scan(tmp_path))
    same(
        separate(flatten_dict(checkpoints.load(contents, "float32")[1], sep="/"), config),
        flatten_dict(checkpoints.load(tmp_path, "float32")[1], sep="/"),
    )
    assert set(contents.tensors) != set(shapes.expected_shapes(config))


@pytest.mark.parametrize("name", [None, "int8"])
def test_weights_in_several_files_are_joined_within_each(checkpoint, tmp_path, name):
    config, params = checkpoints.load(checkpoint(), "bfloat16", quantization=name)
    huggingface.save(tmp_path, config, params, max_shard_bytes=4_000)
    contents = checkpoints.scan(tmp_path)
    assert len(contents.weight_files) > 3
    _, loaded = checkpoints.load(checkpoints.join(contents), "bfloat16")
    same(separate(flatten_dict(loaded, sep="/"), config), flatten_dict(params, sep="/"))


def test_quantized_weights_whose_scales_lie_between_stay_apart(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "write_order", lambda key: 0)  # as they were written once
    config, params = checkpoints.load(checkpoint(), "bfloat16", quantization="int4")
    checkpoints.save(tmp_path, config, params)
    contents = checkpoints.scan(tmp_path)
    assert checkpoints.join(contents).tensors == contents.tensors
    same(checkpoints.load(contents, "bfloat16")[1], params)


def test_joined_parameters_become_an_npz(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), "float32")
    checkpoints.save(tmp_path, config, params)
    _, whole = checkpoints.load(checkpoints.join(checkpoints.scan(tmp_path)), "float32")
    for tree, name in ((params, "apart.npz"), (whole, "whole.npz")):
        big_vision.save(tmp_path / name, config, tree)
    apart, joined = (np.load(tmp_path / name) for name in ("apart.npz", "whole.npz"))
    assert apart.files == joined.files
    for key in apart.files:
        np.testing.assert_array_equal(apart[key], joined[key])


@pytest.mark.parametrize("rows", [slice(1, None), slice(None, -1), [0, *range(100)]], ids=["less", "fewer", "more"])
def test_what_is_mis_shaped_is_named_when_joined_parameters_are_written(checkpoint, tmp_path, rows):
    config, params = checkpoints.load(checkpoint(), "float32")
    checkpoints.save(tmp_path, config, params)
    _, whole = checkpoints.load(checkpoints.join(checkpoints.scan(tmp_path)), "float32")
    mlp = whole["language_model"]["layers_0"]["mlp"]
    weight = np.asarray(mlp["gate_proj+up_proj"]["weight"])
    mlp["gate_proj+up_proj"] = {
        "weight": np.concatenate([weight, weight])[rows] if isinstance(rows, list) else weight[rows]
    }
    with pytest.raises(CheckpointError, match=r"mis-shaped: .*up_proj"):
        checkpoints.save(tmp_path / "again", config, whole)


def test_joined_parameters_that_the_geometry_lacks_are_named(checkpoint, tmp_path):
    config, params = checkpoints.load(checkpoint(), "float32")
    odd = {"a+b": np.zeros(1), "language_model": params["language_model"] | {"layers_99": {"x+y": np.zeros(2)}}}
    with pytest.raises(CheckpointError, match=r"2 unexpected: ") as caught:
        checkpoints.save(tmp_path, config, params | odd)
    assert "a+b" in str(caught.value) and "x+y" in str(caught.value)
