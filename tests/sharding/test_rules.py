"""Which axis of an array lies along which axis of a mesh; no devices are needed for that."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from paligemma_jax import ops
from paligemma_jax.checkpoints import expected_shapes, fused_shapes
from paligemma_jax.config import VARIANTS, TextConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.sharding import AXES, Layout, parse_mesh
from paligemma_jax.training.optimizer import Recipe, make_optimizer
from paligemma_jax.training.step import init_state


def layout_of(config, data=1, fsdp=1, tensor=1) -> Layout:
    return Layout(AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3), config)


def share(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> float:
    """Of all numbers, those that a device has."""
    mine = sum(math.prod(layout.sharding(path, shape).shard_shape(shape)) for path, shape in shapes.items())
    return mine / sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name", ["paligemma2-3b-224", "paligemma2-10b-448", "paligemma2-28b-896"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 4}, {"fsdp": 2, "tensor": 4}])
def test_nearly_all_of_a_released_model_is_divided(name, sizes):
    config = VARIANTS[name]
    layout, count = layout_of(config, **sizes), math.prod(sizes.values())
    shapes = expected_shapes(config)
    assert share(layout, shapes) < 1.01 / count
    assert share(layout, fused_shapes(config)) < 1.01 / count
    assert not layout.notes({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()})


def test_rows_alone_divide_no_parameter():
    config = VARIANTS["paligemma2-3b-224"]
    assert share(layout_of(config, data=8), expected_shapes(config)) == 1


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("language_model/embed_tokens/weight", (257216, 2304), P(("tensor", "fsdp"), None)),
        ("language_model/layers_3/self_attn/q_proj/weight", (2048, 2304), P("tensor", "fsdp")),
        ("language_model/layers_3/self_attn/o_proj/weight", (2304, 2048), P("fsdp", "tensor")),
        ("language_model/layers_3/mlp/down_proj/weight", (2304, 9216), P("fsdp", "tensor")),
        ("language_model/layers_3/mlp/gate_up_proj/weight", (18432, 2304), P("tensor", "fsdp")),
        ("language_model/layers_3/pre_ffw_norm/weight", (2304,), P(None)),
        ("vision_tower/layers_0/mlp/fc1/bias", (4304,), P("tensor")),
        ("vision_tower/layers_0/self_attn/out_proj/bias", (1152,), P("fsdp")),
        ("vision_tower/patch_embedding/weight", (1152, 3, 14, 14), P("fsdp", None, None, None)),
        # what belongs to a parameter: scales of quantized weights, LoRA, DoRA, moments of an optimizer
        ("language_model/layers_3/mlp/down_proj/weight/scale", (2304,), P("fsdp")),
        ("language_model/layers_3/mlp/up_proj/weight/group_scale", (9216, 18), P("tensor", None)),
        ("language_model/layers_3/mlp/up_proj/weight/base/values", (9216, 1152), P("tensor", "fsdp")),
        ("language_model/layers_3/mlp/up_proj/weight/down", (16, 2304), P(None, "fsdp")),
        ("language_model/layers_3/mlp/down_proj/weight/down", (16, 9216), P(None, "tensor")),
        ("language_model/layers_3/mlp/up_proj/weight/up", (9216, 16), P("tensor", None)),
        ("language_model/layers_3/mlp/up_proj/weight/magnitude", (9216,), P("tensor")),
        ("1/0/mu/language_model/layers_3/mlp/up_proj/weight", (9216, 2304), P("tensor", "fsdp")),
        # batches and states
        ("tokens", (8, 300), P(("data", "fsdp"), None)),
        ("pixels", (8, 224, 224, 3), P(("data", "fsdp"), None, None, None)),
        ("cache/3/0", (8, 4, 300, 256), P(("data", "fsdp"), "tensor", None, None)),
        ("count", (), P()),
    ],
)
def test_where_an_array_lies(path, shape, spec):
    layout = layout_of(VARIANTS["paligemma2-3b-224"], 2, 2, 2)
    assert layout.sharding(path, shape).spec == spec


def test_scales_lie_with_their_outputs():
    layout = layout_of(VARIANTS["paligemma2-3b-224"], 2, 2, 2)
    for form in ops.FORMATS:
        for module in ("up_proj", "down_proj"):
            shape = (9216, 2304) if module == "up_proj" else (2304, 9216)
            weight = ops.quantized_shape(jax.ShapeDtypeStruct(shape, jnp.bfloat16), form)
            found = layout.shardings({"language_model": {"layers_0": {"mlp": {module: {"weight": weight}}}}})
            found = found["language_model"]["layers_0"]["mlp"][module]["weight"]
            assert found.values.spec[0] == found.scale.spec[0] != None  # noqa: E711


def test_optimizer_state_lies_with_its_parameters(gemma2):
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(gemma2).items()}
    state = jax.eval_shape(
        lambda params: init_state(params, make_optimizer(Recipe(), 10)), unflatten_dict(shapes, sep="/")
    )
    found = layout_of(gemma2, 2, 2, 2).shardings(state)
    params = flatten_dict(found.params, sep="/")
    for adam in jax.tree.leaves(found.opt_state, is_leaf=lambda x: hasattr(x, "mu")):
        if hasattr(adam, "mu"):
            assert flatten_dict(adam.mu, sep="/") == params == flatten_dict(adam.nu, sep="/")
            break
    else:
        pytest.fail("no moments")
    assert found.step.spec == P()


def test_heads_are_never_cut_and_a_note_says_so(gemma2):
    """4 key-value heads of 256 numbers would divide evenly over 8 devices, but then no device had a whole head."""
    config = VARIANTS["paligemma2-3b-224"]
    layout = layout_of(config, tensor=8)
    path = "language_model/layers_0/self_attn/k_proj/weight"
    assert layout.sharding(path, (1024, 2304)).spec == P(None, None)
    assert layout.sharding("cache/0/0", (1, 4, 300, 256)).spec == P(None, None, None, None)
    [note] = layout.notes({path: jax.ShapeDtypeStruct((1024, 2304), jnp.bfloat16)})
    assert "4 key-value heads" in note and "tensor=8" in note


def test_odd_sizes_are_left_whole_with_a_note(gemma2):
    config = dataclasses.replace(gemma2, text=dataclasses.replace(gemma2.text, vocab_size=101, width=33))
    layout = layout_of(config, fsdp=2, tensor=2)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(config).items()}
    assert layout.sharding("language_model/embed_tokens/weight", (101, 33)).spec == P(None, None)
    notes = layout.notes(shapes)
    assert any("101" in note for note in notes) and any("33" in note for note in notes)


def test_rows_that_do_not_divide_go_over_fewer_axes(gemma2):
    layout = layout_of(gemma2, data=2, fsdp=3)
    assert [layout.sharding("tokens", (rows, 5)).spec[0] for rows in (6, 4, 1)] == [("data", "fsdp"), "data", None]


@pytest.mark.parametrize(
    "text, heads, shape",
    [
        ("data=2,fsdp=2,tensor=2", None, (2, 2, 2)),
        (" tensor = 4 ", None, (1, 1, 4)),
        ("auto", None, (1, 8, 1)),
        ("auto", (16, 8), (1, 1, 8)),
        ("auto", (8, 4), (2, 1, 4)),
        ("auto", (12, 1), (2, 1, 4)),
        ("auto", (3, 3), (8, 1, 1)),
    ],
)
def test_a_mesh_from_text(text, heads, shape):
    model = TextConfig(num_heads=heads[0], num_kv_heads=heads[1]) if heads else None
    assert parse_mesh(text, 8, model) == shape


@pytest.mark.parametrize("text", ["", "tensor", "tensor=0", "model=2", "data=2,data=2", "tensor=-1", "data=3,tensor=3"])
def test_a_mesh_that_cannot_be_is_one_line(text):
    with pytest.raises(ConfigError, match="mesh=") as error:
        parse_mesh(text, 8)
    assert "\n" not in str(error.value)
