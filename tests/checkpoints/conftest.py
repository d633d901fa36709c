"""Tiny geometries and checkpoints, written with the safetensors package and names spelled out by hand."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from paligemma_jax.checkpoints import config_json, expected_shapes
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig

_VISION = VisionConfig(image_size=28, patch_size=7, width=24, num_layers=3, mlp_dim=20, num_heads=4)
_GEMMA = TextConfig(
    vocab_size=96, width=20, num_layers=3, mlp_dim=28, num_heads=4, num_kv_heads=1, head_dim=6, query_scalar=6.0
)
_GEMMA2 = TextConfig(
    version=2,
    vocab_size=96,
    width=20,
    num_layers=3,
    mlp_dim=28,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    query_scalar=10.0,
    attn_softcap=50.0,
    final_softcap=30.0,
    sliding_window=16,
)
CONFIGS = {
    1: PaliGemmaConfig(vision=_VISION, text=_GEMMA, image_token_id=90),
    2: PaliGemmaConfig(vision=_VISION, text=_GEMMA2, image_token_id=90),
}

_VISION_LAYER = [
    f"{module}.{leaf}"
    for module in (
        "layer_norm1",
        "layer_norm2",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    for leaf in ("weight", "bias")
]
_TEXT_LAYER = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
]
_NORMS = {
    1: {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"},
    2: {
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def _names(config: PaliGemmaConfig) -> dict[str, str]:
    """Our path -> name without the layout's prefixes."""
    names = {
        "vision_tower/patch_embedding/weight": "vision:embeddings.patch_embedding.weight",
        "vision_tower/patch_embedding/bias": "vision:embeddings.patch_embedding.bias",
        "vision_tower/position_embedding/weight": "vision:embeddings.position_embedding.weight",
        "vision_tower/post_layernorm/weight": "vision:post_layernorm.weight",
        "vision_tower/post_layernorm/bias": "vision:post_layernorm.bias",
        "multi_modal_projector/linear/weight": "projector:linear.weight",
        "multi_modal_projector/linear/bias": "projector:linear.bias",
        "language_model/embed_tokens/weight": "text:embed_tokens.weight",
        "language_model/norm/weight": "text:norm.weight",
    }
    for i in range(config.vision.num_layers):
        for name in _VISION_LAYER:
            names[f"vision_tower/layers_{i}/{name.replace('.', '/')}"] = f"vision:encoder.layers.{i}.{name}"
    for i in range(config.text.num_layers):
        for name in _TEXT_LAYER:
            names[f"language_model/layers_{i}/{name.replace('.', '/')}"] = f"text:layers.{i}.{name}"
        for theirs, ours in _NORMS[config.version].items():
            names[f"language_model/layers_{i}/{ours}/weight"] = f"text:layers.{i}.{theirs}.weight"
    return names


LAYOUTS = {
    "A": {
        "vision": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
        "text": "language_model.model.",
    },
    "B": {
        "vision": "model.vision_tower.vision_model.",
        "projector": "model.multi_modal_projector.",
        "text": "model.language_model.",
    },
    "C": {"vision": "vision_tower.", "projector": "multi_modal_projector.", "text": "language_model.model."},
}


def keys_of(config: PaliGemmaConfig, layout: str) -> dict[str, str]:
    """Our path -> key of the layout."""
    keys = {}
    for path, name in _names(config).items():
        prefix, rest = name.split(":")
        keys[path] = LAYOUTS[layout][prefix] + rest
    return keys


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write tensors in one file, or dealt out over shards with an index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(params=(1, 2), ids=("gemma", "gemma2"))
def config(request: pytest.FixtureRequest) -> PaliGemmaConfig:
    return CONFIGS[request.param]


@pytest.fixture
def params(config: PaliGemmaConfig) -> dict[str, Any]:
    """Random float32 parameters as a nested tree."""
    rng = np.random.default_rng(0)
    shapes = expected_shapes(config)
    return unflatten_dict({k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}, sep="/")


@pytest.fixture
def tensors(config: PaliGemmaConfig, params: dict[str, Any]) -> Callable[..., dict[str, np.ndarray]]:
    """tensors(layout, dtype) -> key -> array, as a file of that layout holds them."""

    def build(layout: str = "A", dtype: str = "float32") -> dict[str, np.ndarray]:
        keys = keys_of(config, layout)
        return {keys[path]: array.astype(dtype) for path, array in flatten_dict(params, sep="/").items()}

    return build


@pytest.fixture
def checkpoint(tmp_path: Path, config: PaliGemmaConfig, tensors: Callable) -> Callable[..., Path]:
    """checkpoint(layout, dtype, shards, edit) -> a directory; `edit` changes the key -> array dict before writing."""

    def build(layout: str = "A", dtype: str = "float32", shards: int = 1, edit: Callable | None = None) -> Path:
        directory = tmp_path / "checkpoint"
        directory.mkdir(exist_ok=True)
        content = tensors(layout, dtype)
        if edit:
            edit(content)
        write_tensors(directory, content, shards)
        (directory / "config.json").write_text(json.dumps(config_json.to_json(config, dtype)))
        return directory

    return build


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter's --verify finds a tokenizer that fits; these geometries are too small for any."""
    monkeypatch.setattr("paligemma_jax.runs.verify.read_tokenizer", lambda source: None)


@pytest.fixture
def adapter(tmp_path) -> Callable[..., Path]:
    """adapter(tensors, **fields): a directory of PEFT's over that of `checkpoint`; by default of all three queries.

    `target_modules` are by default the whole names of those that the tensors have.
    """

    def write(tensors: dict[str, np.ndarray] | None = None, prefix: str = "base_model.model.", **fields) -> Path:
        if tensors is None:
            module, rng = "model.language_model.layers.{i}.self_attn.q_proj.lora_", np.random.default_rng(0)
            for i, (part, shape) in itertools.product(range(3), (("A", (2, 20)), ("B", (24, 2)))):
                name = f"{module.format(i=i)}{part}.weight"
                tensors = (tensors or {}) | {name: rng.standard_normal(shape).astype(np.float32)}
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        save_file({prefix + name: value for name, value in tensors.items()}, directory / "adapter_model.safetensors")
        low_rank = (name for name in tensors if ".lora_" in name)
        targets = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in low_rank})
        stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets, "bias": "none"}
        stated |= {"base_model_name_or_path": str(tmp_path / "checkpoint"), "inference_mode": True} | fields
        (directory / "adapter_config.json").write_text(json.dumps(stated))
        return directory

    return write


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(array).tobytes(), path


@pytest.fixture
def assert_same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Two parameter trees with the same bits."""
    return _assert_same
