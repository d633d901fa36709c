"""Live comparison with PEFT and transformers: adapters over a base, merged models, and heads that are not tied."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_transformers import GEOMETRIES, ROWS, TOLERANCE

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import tensor_files
from paligemma_jax.checkpoints.adapter_config import read_config
from paligemma_jax.checkpoints.adapter_targets import is_targeted
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.runs.convert import main as convert

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
ADAPTERS = {  # LoraConfig of each; what is drawn at random is far from the identity
    "all seven projections of both": {"target_modules": "all-linear", "lora_alpha": 16},
    "decoder by a pattern, ranks of their own": {
        "target_modules": DECODER,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+_proj": 5},
        "alpha_pattern": {"o_proj": 3, "layers.0.self_attn.q_proj": 7},
    },
    "rsLoRA and the projector": {"target_modules": ["q_proj", "v_proj", "linear"], "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "o_proj", "fc1", "up_proj"], "use_dora": True, "lora_alpha": 9},
    "embeddings": {"target_modules": ["embed_tokens", "position_embedding", "k_proj"]},
    "embeddings, DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "down_proj"]},
    "embedding and head": {"target_modules": ["lm_head", "embed_tokens"]},
    "embedding, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved projector and head": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["multi_modal_projector", "lm_head"],
    },
    "saved embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "saved embedding, tied": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "biases": {"target_modules": ["fc1", "q_proj"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["fc1", "fc2"], "bias": "lora_only"},
    "bias of B": {"target_modules": ["fc1", "out_proj", "linear"], "lora_bias": True},
    "patches": {"target_modules": ["patch_embedding"]},
    "patches, DoRA": {"target_modules": ["patch_embedding"], "use_dora": True},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}
OTHERS = ("all seven projections of both", "DoRA", "saved projector and head")  # of the second generation


@pytest.fixture(scope="module")
def reference():
    """Our wrapper of transformers."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    import torch_reference

    return torch_reference


CASES = [("gemma-groups-of-2", name) for name in ADAPTERS] + [("gemma2-groups-of-2", name) for name in OTHERS]


@pytest.fixture(scope="module", params=["gemma-groups-of-2", "gemma2-groups-of-2"])
def geometry(request) -> PaliGemmaConfig:
    return GEOMETRIES[request.param]


@pytest.fixture(scope="module")
def base(reference, geometry, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    reference.random_model(geometry).save_pretrained(directory)
    return directory


@pytest.fixture
def adapted(reference, base, tmp_path) -> Callable:
    """adapted(**LoraConfig): a random adapter over the base, in PEFT and as a directory."""

    def make(**settings):
        import peft
        import torch

        torch.manual_seed(1)
        model = peft.get_peft_model(reference.read_model(base), peft.LoraConfig(**({"r": 3} | settings)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "base_layer" not in name:
                drawn = torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.05)
                change = parameter + drawn if "lora_" not in name or "magnitude" in name else drawn
                parameter.data.copy_(change)
        model.save_pretrained(tmp_path / "adapter")
        return model.eval(), tmp_path / "adapter"

    return make


def same(reference, model, loaded, our_logits, our_greedy, error) -> None:
    """Logits to TOLERANCE and equal greedy tokens."""
    batch = reference.random_batch(loaded[0], ROWS)
    expected = reference.logits(model, batch)
    assert error(our_logits(*loaded, batch), expected, batch) < TOLERANCE
    prompts = dataclasses.replace(batch, length=batch.prefix_length)
    tokens = reference.greedy(model, prompts, 16)
    np.testing.assert_array_equal(our_greedy(*loaded, prompts, 16), tokens)


@pytest.mark.parametrize("geometry, name", CASES, indirect=["geometry"])
def test_adapters_give_what_peft_gives(reference, geometry, base, adapted, name, our_logits, our_greedy, error):
    plain = checkpoints.load(base, "float32", progress=False)
    model, directory = adapted(**ADAPTERS[name])
    loaded = checkpoints.load(directory, "float32", progress=False)
    batch = reference.random_batch(geometry, ROWS)
    assert error(our_logits(*plain, batch), reference.logits(model, batch), batch) > 100 * TOLERANCE
    same(reference, model, loaded, our_logits, our_greedy, error)


@pytest.mark.parametrize("name", ["all seven projections of both", "embedding, tied", "head"])
def test_merged_models_give_the_same_in_transformers(
    reference, base, adapted, tmp_path, name, our_logits, our_greedy, error
):
    """What the converter writes, read by transformers and by us."""
    model, directory = adapted(**ADAPTERS[name])
    assert convert([str(base), str(tmp_path / "merged"), "--adapter", str(directory)]) == 0
    loaded = checkpoints.load(tmp_path / "merged", "float32", progress=False)
    same(reference, model, loaded, our_logits, our_greedy, error)
    same(reference, reference.read_model(tmp_path / "merged"), loaded, our_logits, our_greedy, error)


@pytest.mark.parametrize(
    "old", [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.vision_model.")]
)
def test_adapters_of_older_names_are_the_same(reference, adapted, old, our_logits, our_greedy, error):
    model, directory = adapted(target_modules="all-linear")
    tensors = tensor_files.read_header(directory / "adapter_model.safetensors")
    renamed = {name.replace(*old): tensor_files.read(tensor) for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    tensor_files.write(directory / "adapter_model.safetensors", renamed)
    loaded = checkpoints.load(directory, "float32", progress=False)
    same(reference, model, loaded, our_logits, our_greedy, error)


@pytest.mark.parametrize("stated", [(True, True), (False, True), (False, False), (None, None)])
def test_a_head_of_its_own_gives_what_transformers_gives(
    reference, geometry, base, tmp_path, stated, our_logits, our_greedy, error
):
    """Whatever config.json says of it, at the top and in text_config; and once more as we write it."""
    tensors = {key: tensor_files.read(t) for key, t in tensor_files.read_header(base / "model.safetensors").items()}
    [table] = [tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight")]
    head = table + np.random.default_rng(0).normal(size=table.shape).astype(np.float32) * 0.1
    tensor_files.write(tmp_path / "model.safetensors", tensors | {"lm_head.weight": head})
    fields = json.loads((base / "config.json").read_text())
    for section, value in zip((fields, fields["text_config"]), stated, strict=True):
        section.pop("tie_word_embeddings", None)
        section |= {} if value is None else {"tie_word_embeddings": value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, loaded = reference.read_model(tmp_path), checkpoints.load(tmp_path, "float32", progress=False)
    assert not loaded[0].text.tied
    same(reference, model, loaded, our_logits, our_greedy, error)
    checkpoints.save(tmp_path / "again", *loaded)
    same(reference, reference.read_model(tmp_path / "again"), loaded, our_logits, our_greedy, error)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "fc1", "c_attn", "lm_head"]},
        {"target_modules": ["layers.1.self_attn.q_proj", "proj", "1.mlp.fc2"]},
        {"target_modules": r".*language_model.*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "linear"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["0.self_attn.q_proj", "mlp"]},
        {"target_modules": ["q_proj", "linear", "lm_head"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
        {"target_modules": "all-linear"},
    ],
)
@pytest.mark.parametrize("geometry", ["gemma-groups-of-2"], indirect=True)
def test_modules_are_targeted_as_peft_targets_them(reference, base, tmp_path, settings):
    import peft

    plain = reference.read_model(base)
    kinds = {name: module.weight.ndim for name, module in plain.named_modules() if hasattr(module, "weight")}
    kinds = {name: num_axes for name, num_axes in kinds.items() if num_axes > 1}
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, **settings))
    model.peft_config["default"].save_pretrained(tmp_path)
    written = read_config(tmp_path)
    targeted = {name for name, num_axes in kinds.items() if is_targeted(name, num_axes, written)}
    assert targeted == set(model.base_model.targeted_module_names)
    if settings["target_modules"] == "all-linear":  # which PEFT writes out
        written = dataclasses.replace(written, target_modules="all-linear")
        assert targeted == {name for name, num_axes in kinds.items() if is_targeted(name, num_axes, written)}
