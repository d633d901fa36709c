"""Patterns of names, labels, and parameters that are divided and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax import ops
from paligemma_jax.errors import ConfigError
from paligemma_jax.training.trainable import join, labels, matching, matching_any, names_of, split

Q, NORM = "language_model/layers_{}/self_attn/q_proj/weight", "language_model/norm/weight"


@pytest.fixture(scope="module")
def names(small):
    return names_of(small)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (r".*language_model.*\.q_proj", [Q.format(0), Q.format(1)]),  # PEFT's, with any naming
        ("model.language_model.layers.1.self_attn.q_proj", [Q.format(1)]),
        ("language_model.model.layers.1.self_attn.q_proj.weight", [Q.format(1)]),  # before transformers 4.52
        ("language_model/layers_1/self_attn/q_proj", [Q.format(1)]),
        ("language_model/layers_?/self_attn/q_proj", [Q.format(0), Q.format(1)]),
        ("language_model/norm", [NORM]),
        ("*/norm/weight", [NORM]),
        ("model.language_model.layers.0.input_layernorm", ["language_model/layers_0/pre_attention_norm/weight"]),
        ("linear", ["multi_modal_projector/linear/weight", "multi_modal_projector/linear/bias"]),
    ],
)
def test_a_pattern_is_a_name_a_glob_or_a_regular_expression_of_any_name(names, pattern, expected):
    assert sorted(matching(pattern, names)) == sorted(expected)


def test_a_part_of_a_name_means_all_that_has_it(names):
    assert matching("vision_tower", names) == [path for path in names if path.startswith("vision_tower/")]
    assert len(matching("q_proj", names)) == 2 + 4  # also those of the encoder, with their biases
    assert matching_any("vision_tower; language_model", names) == {n for n in names if "multi" not in n}
    assert matching_any("", names) == set()


@pytest.mark.parametrize(
    "pattern, hint",
    [("q_prj", "did you mean .*q_proj"), ("vision_towr/*", "did you mean|give a name"), ("(", "give a name, a glob")],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_close_names(names, pattern, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        matching_any(f"norm {pattern}", names)
    assert repr(pattern) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_are_those_of_the_first_pattern(small, random_params, names):
    trained, _ = split(random_params(small), [Q.format(0), NORM])
    trained["language_model"]["layers_1"] = {"mlp": {"up_proj": {"weight": {"down": jnp.ones(1), "up": jnp.ones(1)}}}}
    rules = [("norm", 0.0), ("language_model", 0.5)]
    found = flatten_dict(labels(trained, rules, names=names), sep="/")
    assert found == {
        Q.format(0): 0.5,
        NORM: 0.0,
        "language_model/layers_1/mlp/up_proj/weight/down": 0.5,
        "language_model/layers_1/mlp/up_proj/weight/up": 0.5,
    }
    found = labels(trained, [(r".*\.up_proj", 2.0)], default=1.0, names=names)
    assert found["language_model"]["layers_1"]["mlp"]["up_proj"]["weight"] == {"down": 2.0, "up": 2.0}
    assert found["language_model"]["norm"]["weight"] == 1.0
    with pytest.raises(ConfigError, match=r"language_model/.*and 1 more parameters fit none of the patterns q_proj"):
        labels(trained, [("q_proj", 1.0)], names=names)
    with pytest.raises(ConfigError, match="'vision_tower' matches no parameter"):  # nothing of it trains
        labels(trained, [("vision_tower", 1.0)], default=1.0, names=names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_divided_and_joined_parameters_are_the_same(small, random_params, dtype):
    params = random_params(small, dtype)
    trained, frozen = split(params, [Q.format(1), NORM])
    assert sorted(flatten_dict(trained, sep="/")) == [Q.format(1), NORM]
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    again = join(trained, frozen, dtype)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(dtype)}


def test_a_quantized_weight_cannot_train(small, random_params):
    params = jax.tree.map(lambda leaf: leaf, random_params(small))
    table = params["language_model"]["embed_tokens"]
    table["weight"] = ops.quantize(table["weight"], "int8")
    with pytest.raises(ConfigError, match="embed_tokens/weight is int8 and cannot train whole"):
        split(params, ["language_model/embed_tokens/weight"])
