"""Adapters: over which weights, how they begin, and what is written of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import paligemma_jax as pj
from paligemma_jax import checkpoints, ops
from paligemma_jax.checkpoints import low_rank, tensor_files
from paligemma_jax.checkpoints.adapter_targets import TABLE
from paligemma_jax.errors import ConfigError
from paligemma_jax.training import adapters
from paligemma_jax.training.adapters import LoraSettings
from paligemma_jax.training.trainable import join, names_of, split

UP = "language_model/layers_0/mlp/up_proj/weight"


def drawn(settings, params, paths, seed=0):
    """Adapters whose B is not zero."""
    tree = adapters.init_adapters(params, paths, settings, seed)
    keys = iter(jax.random.split(jax.random.key(7), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), tree)


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("decoder", "decoder: 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj, 2 gate_proj, 2 up_proj, 2 down_proj"),
        ("q_proj v_proj", "image encoder: 2 q_proj, 2 v_proj; decoder: 2 q_proj, 2 v_proj"),
        (r".*language_model.*\.(q|v)_proj", "decoder: 2 q_proj, 2 v_proj"),
        ("multi_modal_projector; *.fc1", "image encoder: 2 fc1; projector: 1 linear"),
        ("embed_tokens", "decoder: 1 embed_tokens"),
    ],
)
def test_targets_are_told_by_their_kinds(small, targets, expected):
    """Names alone also catch the image encoder's, which is seen here."""
    assert adapters.describe(adapters.target_paths(LoraSettings(targets=targets), names_of(small))) == expected


def test_all_linear_layers_and_what_is_frozen(small):
    names = names_of(small)
    found = adapters.target_paths(LoraSettings(targets="all"), names)
    assert len(found) == 2 * 7 + 2 * 6 + 1 and not any("embed" in path for path in found)
    frozen = {path for path in names if path.startswith("vision_tower")}
    assert set(adapters.target_paths(LoraSettings(targets="all"), names, frozen)) == set(found) - frozen


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": "q_prj"}, "'q_prj' matches no parameter: did you mean"),
        ({"targets": "patch_embedding"}, "'patch_embedding' means vision_tower/patch_embedding.* no convolution"),
        ({"targets": "q_proj norm"}, "'norm' means language_model/norm/weight alone"),
        ({"targets": "embed_tokens", "use_dora": True}, "leave embed_tokens out"),
        ({"rank": 0}, "lora_rank=0 is not possible"),
        ({"alpha": 0.0}, "lora_alpha=0.0 is not possible"),
        ({"targets": " ; "}, "lora_targets is empty"),
    ],
)
def test_what_cannot_be_adapted(small, settings, message):
    with pytest.raises(ConfigError, match=message):
        adapters.target_paths(LoraSettings(**settings), names_of(small))


def test_adapters_begin_as_those_of_peft(small, random_params):
    params, settings = random_params(small), LoraSettings(rank=4, use_dora=True)
    tree = adapters.init_adapters(params, [UP], settings, 0)
    part = tree["language_model"]["layers_0"]["mlp"]["up_proj"]["weight"]
    bound = small.text.width**-0.5
    assert np.abs(part["down"]).max() <= bound and np.asarray(part["down"]).std() == pytest.approx(
        bound / 3**0.5, rel=0.2
    )
    assert not np.asarray(part["up"]).any()
    whole = join(tree, split(params, [])[1], "float32", settings.scale)
    weight = whole["language_model"]["layers_0"]["mlp"]["up_proj"]["weight"]
    plain = flatten_dict(params, sep="/")[UP]
    np.testing.assert_allclose(weight.dequantize(), plain, rtol=1e-5)
    np.testing.assert_allclose(part["magnitude"], np.linalg.norm(plain, axis=1), rtol=1e-5)
    assert (LoraSettings(4, 16.0).scale, LoraSettings(4, 16.0, use_rslora=True).scale) == (4.0, 8.0)
    other = adapters.init_adapters(params, [UP], settings, 1)
    assert (jax.tree.leaves(other)[0] != jax.tree.leaves(tree)[0]).any()


SAVED = {
    "decoder": LoraSettings(4, 6.0),
    "all, rsLoRA": LoraSettings(2, 3.0, "all", use_rslora=True),
    "all, DoRA": LoraSettings(3, 5.0, "all", use_dora=True),
    "table and projections": LoraSettings(3, 5.0, "embed_tokens q_proj"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SAVED)
def test_what_is_written_is_read_back_and_merged_to_the_bit(small, checkpoint, random_params, tmp_path, name, dtype):
    settings, params = SAVED[name], random_params(small)
    trained = drawn(settings, params, adapters.target_paths(settings, names_of(small)))
    whole, frozen = split(params, ["multi_modal_projector/linear/bias"] if name == "decoder" else [])
    trained |= jax.tree.map(lambda leaf: leaf + 1, whole)
    adapters.save(tmp_path / "adapter", small, trained, frozen, settings, str(checkpoint))
    _, read = checkpoints.load(tmp_path / "adapter", dtype, progress=False)
    merged = adapters.merge(checkpoint, trained, settings, dtype)
    assert jax.tree.structure(merged) == jax.tree.structure(read)
    jax.tree.map(np.testing.assert_array_equal, merged, read)
    if dtype == "float32":  # and it is what was trained
        ours = join(trained, frozen, "float32", settings.scale)
        ours = jax.tree.map(ops.dequantize, ours, is_leaf=ops.is_weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, merged)
        before, after = (flatten_dict(tree, sep="/") for tree in (params, merged))
        changed = [path for path in after if (after[path] != before[path]).any()]
        assert len(changed) == len(adapters.target_paths(settings, names_of(small))) + len(jax.tree.leaves(whole))


def test_the_files_are_those_of_peft(small, checkpoint, random_params, tmp_path):
    settings = LoraSettings(4, 6.0, "up_proj multi_modal_projector")
    trained = drawn(settings, random_params(small), adapters.target_paths(settings, names_of(small)))
    adapters.save(tmp_path, small, trained, random_params(small), settings, "org/name")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [f"model.language_model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert sorted(fields["target_modules"]) == [*names, "model.multi_modal_projector.linear"]
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "org/name", "bias": "none"}
    assert expected.items() <= fields.items() and fields["modules_to_save"] is None
    tensors = tensor_files.read_header(tmp_path / "adapter_model.safetensors")
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    assert shapes[f"base_model.model.{names[0]}.lora_A.weight"] == ("F32", (4, 32))
    assert shapes[f"base_model.model.{names[1]}.lora_B.weight"] == ("F32", (48, 4)) and len(shapes) == 6


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_a_quantized_checkpoint_is_dequantized_where_it_is_merged(small, checkpoint, random_params, tmp_path, stored):
    pj.load(checkpoint, dtype="float32", quantization=stored, prepare=False).save(tmp_path / "quantized")
    settings = LoraSettings(4, 6.0, "q_proj")
    paths = adapters.target_paths(settings, names_of(small))
    trained = drawn(settings, random_params(small), paths)
    merged = flatten_dict(adapters.merge(tmp_path / "quantized", trained, settings, "float32"), sep="/")
    assert {leaf.dtype for leaf in merged.values()} == {np.dtype("float32")}
    q = paths[-1]
    part = flatten_dict(trained, sep="/")
    base = np.asarray(ops.quantize(flatten_dict(random_params(small), sep="/")[q], stored).dequantize())
    expected = low_rank.merge(base, np.asarray(part[f"{q}/up"]), np.asarray(part[f"{q}/down"]), settings.scale)
    np.testing.assert_allclose(merged[q], expected, rtol=1e-5, atol=1e-6)
    assert jnp.dtype(merged[TABLE].dtype) == jnp.float32
