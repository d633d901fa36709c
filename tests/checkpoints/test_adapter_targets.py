"""Which modules an adapter must have: those that PEFT targets, by the names that transformers had."""

import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints.adapter_config import read_config
from paligemma_jax.errors import CheckpointError, ConfigError

Q = "model.language_model.layers.{i}.self_attn.q_proj"


def scan(path: Path) -> None:
    checkpoints.scan(checkpoints.locate(path))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        scan(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs(*modules: str) -> dict[str, np.ndarray]:
    """Low-rank parts of queries of the decoder ("0.self_attn.q_proj") or, "vision 0.self_attn.q_proj", the encoder."""
    found: dict[str, np.ndarray] = {}
    for module in modules:
        where, _, name = module.rpartition(" ")
        first = "model.vision_tower.encoder.layers." if where else "model.language_model.layers."
        inputs = 24 if where else 20
        found |= {f"{first}{name}.lora_A.weight": np.ones((2, inputs), np.float32)}
        found |= {f"{first}{name}.lora_B.weight": np.ones((24, 2), np.float32)}
    return found


QUERIES = tuple(f"{i}.self_attn.q_proj" for i in range(3))
SEEN = tuple(f"vision {name}" for name in QUERIES)


@pytest.mark.parametrize(
    "fields, modules, lacks",
    [
        ({"target_modules": ["q_proj", "v_proj"]}, QUERIES + SEEN, "layers_{0-2}/self_attn/v_proj"),
        ({"target_modules": ["q_proj"]}, QUERIES, "vision_tower/layers_{0-2}/self_attn/q_proj/weight"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, QUERIES[:1], "vision_tower/layers_0/self_attn/q_proj"),
        ({"target_modules": r".*language_model.*\.(q|v)_proj"}, QUERIES, "layers_{0-2}/self_attn/v_proj/weight"),
        ({"target_modules": r".*language_model.*\.q_proj"}, QUERIES[::2], "language_model/layers_1/self_attn/q_proj"),
        ({"target_modules": r"language_model\.model\..*\.q_proj"}, QUERIES[1:], "language_model/layers_0/self_attn"),
        ({"target_modules": [Q.format(i=i) for i in range(3)]}, QUERIES[::2], "language_model/layers_1/self_attn"),
        (
            {"target_modules": [f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(3)]},
            QUERIES[:2],
            "language_model/layers_2/self_attn/q_proj",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "exclude_modules": r".*vision_tower.*"},
            QUERIES[:1],
            "language_model/layers_1/self_attn/q_proj",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, QUERIES[2:], "vision_tower/layers_2"),
        ({"target_modules": "all-linear"}, QUERIES + SEEN, "multi_modal_projector/linear/weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, QUERIES + SEEN, "language_model/lm_head/weight"),
    ],
)
def test_modules_that_are_named_and_lack_are_said(checkpoint, adapter, fields, modules, lacks):
    checkpoint()
    message = refusal(adapter(pairs(*modules), **fields))
    assert "it lacks " in message and lacks in message and "target_modules" in message


@pytest.mark.parametrize(
    "fields, modules",
    [
        ({"target_modules": ["q_proj", "c_attn"]}, QUERIES + SEEN),  # PEFT passes by what is not there
        ({"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"}, QUERIES),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*vision_model.*"}, QUERIES),  # by the older names
        ({"target_modules": ["q_proj"], "exclude_modules": r".*vision_model.*"}, QUERIES + SEEN),  # by the newer
        ({"target_modules": ["q_proj"], "exclude_modules": [m.split()[-1] for m in SEEN[1:]]}, QUERIES[:1] + SEEN[:1]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, QUERIES[1:2] + SEEN[1:2]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
            QUERIES[::2] + SEEN[::2],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
            (QUERIES + SEEN)[1::3],
        ),
        ({"target_modules": r"(?i).*LANGUAGE_MODEL.*q_proj"}, QUERIES),
    ],
)
def test_modules_that_peft_does_not_target_may_lack(checkpoint, adapter, fields, modules):
    checkpoint()
    scan(adapter(pairs(*modules), **fields))


def test_a_model_without_its_head_has_none_to_target(checkpoint, adapter):
    checkpoint()
    tensors = {name.removeprefix("model."): value for name, value in pairs(*QUERIES, *SEEN).items()}
    scan(adapter(tensors, target_modules=["q_proj", "lm_head"]))


def test_all_of_a_saved_module_must_be_there(checkpoint, adapter):
    checkpoint()
    linear = {"model.multi_modal_projector.linear.weight": np.ones((20, 24), np.float32)}
    message = refusal(adapter(pairs(*QUERIES) | linear, modules_to_save=["multi_modal_projector"]))
    assert "modules_to_save names: multi_modal_projector/linear/bias" in message


@pytest.mark.parametrize(
    "pattern, is_taken",
    [
        ("(.*.*.*)*x", False),
        ("(a+)+", False),
        (r"((q|k)*)*_proj", False),
        (r".*language_model.*\.(q|v)_proj", True),
        (r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|ffn).*?(?:q_proj|k_proj|v_proj|o_proj).*?)", True),
        (r".*layers\.(1[0-9]|2[0-9])\..*proj", True),
    ],
)
def test_patterns_that_could_take_for_ever_are_refused(tmp_path, pattern, is_taken):
    config = {"peft_type": "LORA", "target_modules": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if is_taken:
        assert read_config(tmp_path).target_modules == pattern
    else:
        with pytest.raises(ConfigError, match="target_modules"):
            read_config(tmp_path)
