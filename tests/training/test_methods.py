"""What each method loads and trains, and what it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import paligemma_jax as pj
from paligemma_jax import checkpoints, ops
from paligemma_jax.errors import ConfigError
from paligemma_jax.training import methods
from paligemma_jax.training.methods import Method


@pytest.fixture(scope="module")
def plan_of(checkpoint):
    """plan_of(KEY=VALUE, ...): the model that a method loads, and its plan."""

    def make(dtype="bfloat16", path=checkpoint, seed=0, **fields):
        method = Method(**fields)
        model = methods.load_base(method, path, dtype)
        return model, methods.make_plan(method, model, dtype, seed)

    return make


def trains(plan):
    """The parameters that train, those with adapters by their own names."""
    paths = {path.removesuffix("/down").removesuffix("/up") for path in flatten_dict(plan.trained, sep="/")}
    return {path.removesuffix("/weight").removesuffix("/bias") for path in paths}


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_full_and_decoder(plan_of, small):
    everything = {path.rpartition("/")[0] for path in checkpoints.expected_shapes(small)}
    decoder = {path for path in everything if path.startswith("language_model/")}
    _, plan = plan_of(method="full")
    assert trains(plan) == everything and not jax.tree.leaves(plan.frozen) and dtypes(plan.trained) == {"float32"}
    assert plan.summary.startswith("full: ") and plan.summary.endswith(" parameters")
    _, plan = plan_of(method="decoder")
    assert trains(plan) == decoder and dtypes(plan.frozen) == {"bfloat16"}
    assert dtypes(plan.join(plan.trained, plan.frozen)) == {"bfloat16"}
    _, plan = plan_of(method="decoder", freeze="embed_tokens *norm*")
    assert trains(plan) == {path for path in decoder if "norm" not in path and "embed_tokens" not in path}
    _, plan = plan_of(trainable="multi_modal_projector language_model/norm", freeze="bias")
    assert sorted(flatten_dict(plan.trained, sep="/")) == [
        "language_model/norm/weight",
        "multi_modal_projector/linear/weight",
    ]


def test_lora(plan_of):
    model, plan = plan_of(method="lora", lora_rank=2, lora_alpha=3.0)
    assert "adapters of rank 2 over decoder: 2 q_proj, 2 k_proj" in plan.summary
    assert dtypes(plan.trained) == {"float32"} and dtypes(plan.frozen) == {"bfloat16"}
    joined = plan.join(plan.trained, plan.frozen)
    weight = joined["language_model"]["layers_0"]["self_attn"]["q_proj"]["weight"]
    assert weight.scale == 1.5 and weight.magnitude is None and weight.down.shape == (2, 32)
    merged = jax.tree.map(ops.dequantize, joined, is_leaf=ops.is_weight)
    jax.tree.map(np.testing.assert_array_equal, merged, model.params)  # nothing has changed yet
    _, plan = plan_of(method="lora", lora_targets="q_proj", freeze="vision_tower layers_1", use_rslora=True)
    assert trains(plan) == {"language_model/layers_0/self_attn/q_proj"}
    assert plan.join.keywords["scale"] == 16 / 8**0.5
    _, plan = plan_of(method="lora", trainable="multi_modal_projector", use_dora=True)
    parts = {path.rpartition("/")[2] for path in flatten_dict(plan.trained, sep="/")}
    assert parts == {"down", "up", "magnitude", "weight", "bias"} and len(trains(plan)) > 10


@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_qlora(plan_of, checkpoint, tmp_path, quantization):
    _, plan = plan_of(method="qlora", quantization=quantization)
    flat = flatten_dict(plan.frozen, sep="/")
    q, up = (flat[f"language_model/layers_1/{name}/weight"] for name in ("self_attn/q_proj", "mlp/up_proj"))
    assert {q.quantization, up.quantization} == {"int4" if quantization == "auto" else "int8"}
    assert flat["vision_tower/layers_0/self_attn/q_proj/weight"].quantization == "int8"
    assert q.dtype == jnp.bfloat16 and flat["language_model/norm/weight"].dtype == jnp.bfloat16
    pj.load(checkpoint, dtype="bfloat16", quantization="int8", prepare=False).save(tmp_path / "int8")
    if quantization == "auto":  # as the checkpoint has it
        _, stored = plan_of(method="qlora", path=tmp_path / "int8")
        assert flatten_dict(stored.frozen, sep="/")["language_model/embed_tokens/weight"].quantization == "int8"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "lorra"}, "method='lorra' is not possible: give full, decoder, lora, qlora"),
        ({"quantization": "int4"}, "quantization=int4 is for method=qlora"),
        ({"method": "qlora", "quantization": "int3"}, "quantization='int3' is not possible"),
        ({"freeze": "language_model vision_tower multi_modal_projector"}, "nothing trains"),
        ({"trainable": "multi_modal_projectr"}, "matches no parameter: did you mean .*multi_modal_projector"),
        ({"method": "lora", "freeze": "language_model"}, "leaves nothing that freeze does not name"),
        ({"method": "lora", "lora_targets": "fc1", "trainable": "*/fc1/bias"}, "so that its bias cannot train"),
        ({"method": "qlora", "trainable": "embed_tokens"}, "embed_tokens/weight is int4 and cannot train whole"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
    ],
)
def test_what_cannot_be_done_is_one_line(plan_of, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(**fields)
    assert "\n" not in str(caught.value)


def test_bases_that_a_method_is_not_for(plan_of, checkpoint, small, tmp_path):
    pj.load(checkpoint, dtype="float32", quantization="int4", prepare=False).save(tmp_path / "int4")
    for method in ("full", "lora"):
        with pytest.raises(ConfigError, match=r"is quantized and cannot be trained: give .* or method=qlora"):
            plan_of(path=tmp_path / "int4", method=method)
    with pytest.raises(ConfigError, match="is int4 already"):
        plan_of(path=tmp_path / "int4", method="qlora", quantization="int8")
    model, plan = plan_of(method="lora")
    methods.export(Method("lora"), model, plan, plan.trained, checkpoint, "bfloat16", tmp_path / "out")
    with pytest.raises(ConfigError, match="is an adapter, and method=lora trains one over a whole model: merge it"):
        plan_of(path=tmp_path / "out" / "adapter", method="lora")


def test_a_bias_beside_a_quantized_weight_is_written(plan_of, checkpoint, tmp_path):
    """Its module is saved whole, with the weight that the checkpoint has."""
    model, plan = plan_of(method="qlora", trainable="*/fc1/bias")
    trained = jax.tree.map(lambda leaf: leaf + 0.01, plan.trained)
    methods.export(Method("qlora"), model, plan, trained, checkpoint, "bfloat16", tmp_path)
    written, again, before = (
        flatten_dict(pj.load(path, dtype="bfloat16", prepare=False).params, sep="/")
        for path in (tmp_path, tmp_path / "adapter", checkpoint)
    )
    jax.tree.map(np.testing.assert_array_equal, again, written)
    layer = "vision_tower/layers_0/mlp/fc1"
    assert (written[f"{layer}/weight"] == before[f"{layer}/weight"]).all()
    assert (written[f"{layer}/bias"] != before[f"{layer}/bias"]).any()


@pytest.mark.parametrize("name", ["full", "decoder", "lora", "qlora"])
def test_what_is_written_loads(plan_of, checkpoint, tmp_path, name):
    """The model, and the adapter, which gives the same one."""
    model, plan = plan_of(method=name)
    trained = jax.tree.map(lambda leaf: leaf + 0.01, plan.trained)
    methods.export(Method(name), model, plan, trained, checkpoint, "bfloat16", tmp_path)
    written = pj.load(tmp_path, prepare=False).params
    if name in ("lora", "qlora"):
        again = pj.load(tmp_path / "adapter", prepare=False).params
        jax.tree.map(np.testing.assert_array_equal, again, written)
    else:
        jax.tree.map(np.testing.assert_array_equal, plan.join(trained, plan.frozen), written)
    assert (tmp_path / "adapter").exists() == (name in ("lora", "qlora"))
    assert ("over int4 weights, and what is written" in plan.summary) == (name == "qlora")
    before = flatten_dict(pj.load(checkpoint, prepare=False).params, sep="/")
    tower = "vision_tower/layers_0/self_attn/q_proj/weight"
    assert (flatten_dict(written, sep="/")[tower] == before[tower]).all() == (name != "full")
