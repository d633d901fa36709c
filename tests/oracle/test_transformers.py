"""Live comparison with transformers and torch in float32: logits, greedy tokens and files, for several geometries."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

import paligemma_jax
from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import tensor_files
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.processing.processor import Batch

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

TINY = Path(__file__).parents[2] / "assets" / "tiny"
TOLERANCE = 1e-4

_VISION = VisionConfig(image_size=42, patch_size=14, width=24, num_layers=3, mlp_dim=40, num_heads=3)
_GEMMA = TextConfig(
    vocab_size=104,
    width=32,
    num_layers=3,
    mlp_dim=48,
    num_heads=4,
    num_kv_heads=1,
    head_dim=12,
    query_scalar=12.0,
    max_positions=128,
)
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    version=2,
    num_kv_heads=2,
    query_scalar=5.0,
    attn_softcap=1.5,
    final_softcap=2.0,
    sliding_window=7,
)


def _variant(text: TextConfig, vision: VisionConfig = _VISION, **changes) -> PaliGemmaConfig:
    # <eos> is a reserved id, which is never chosen: every answer has its 32 tokens.
    return PaliGemmaConfig(vision, dataclasses.replace(text, **changes), image_token_id=96, eos_token_id=100)


GEOMETRIES = {
    "gemma-groups-of-4": _variant(_GEMMA),
    "gemma-groups-of-2": _variant(_GEMMA, num_kv_heads=2, num_layers=5, head_dim=6, query_scalar=6.0, rope_theta=500.0),
    "gemma-groups-of-1": _variant(_GEMMA, num_kv_heads=4, num_layers=2, width=20, rms_norm_eps=1e-2),
    "gemma2-groups-of-2": _variant(_GEMMA2),  # its window of 7 is shorter than any prefix
    "gemma2-groups-of-4": _variant(
        _GEMMA2,
        VisionConfig(image_size=16, patch_size=4, width=20, num_layers=1, mlp_dim=24, num_heads=5, layer_norm_eps=1e-2),
        num_kv_heads=1,
        num_layers=5,
        sliding_window=3,
        query_scalar=20.0,
    ),
    "gemma2-groups-of-1": _variant(
        _GEMMA2, num_kv_heads=4, num_layers=2, sliding_window=2, attn_softcap=None, final_softcap=None
    ),
    "gemma2-wide-window": _variant(_GEMMA2, num_layers=1, sliding_window=64, attn_softcap=50.0, final_softcap=30.0),
}
ROWS = [(1, 5, 9), (2, 3, 4), (1, 9, 1), (1, 1, 12), (2, 8, 8)]  # pictures, prefix, suffix


@pytest.fixture(scope="module")
def reference():
    """Our wrapper of transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch_reference

    return torch_reference


@pytest.fixture(scope="module", params=GEOMETRIES)
def geometry(request) -> PaliGemmaConfig:
    return GEOMETRIES[request.param]


@pytest.fixture(scope="module")
def model(reference, geometry):
    return reference.random_model(geometry)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory) -> Path:
    """The model as transformers writes it: layout C."""
    directory = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(directory) -> tuple[PaliGemmaConfig, dict]:
    return checkpoints.load(directory, "float32", progress=False)


def _prompts(reference, config: PaliGemmaConfig) -> Batch:
    """The rows without their suffixes, whose tokens are now padding."""
    batch = reference.random_batch(config, ROWS)
    return dataclasses.replace(batch, length=batch.prefix_length)


def _one_row(batch: Batch, row: int) -> Batch:
    """Row `row` without its padding; all pictures stay."""
    length = batch.length[row]
    part = {name: getattr(batch, name)[row : row + 1] for name in ("tokens", "image_slots", "prefix_length", "length")}
    part |= {name: part[name][:, :length] for name in ("tokens", "image_slots")}
    return dataclasses.replace(batch, **part)


def test_the_saved_config_gives_the_geometry(loaded, geometry):
    assert loaded[0] == geometry


def test_logits_of_prefix_and_suffix(reference, model, loaded, our_logits, error):
    batch = reference.random_batch(loaded[0], ROWS)
    expected = reference.logits(model, batch)
    assert expected.std() > 0.3, "logits this even would hide a mistake"
    assert error(our_logits(*loaded, batch), expected, batch) < TOLERANCE


def test_logits_at_batch_one(reference, model, loaded, our_logits, error):
    batch = _one_row(reference.random_batch(loaded[0], ROWS), 0)
    assert error(our_logits(*loaded, batch), reference.logits(model, batch), batch) < TOLERANCE


def test_greedy_tokens_of_a_ragged_batch(reference, model, loaded, our_greedy):
    """transformers pads on the left here; its rows are the same as alone (see below), so its padding is right."""
    batch = _prompts(reference, loaded[0])
    expected = reference.greedy(model, batch, 32)
    assert expected.shape == (5, 32)
    assert len(np.unique(expected)) > 16, "answers this monotonous would hide a mistake"
    np.testing.assert_array_equal(our_greedy(*loaded, batch, 32), expected)


def test_greedy_tokens_at_batch_one(reference, model, loaded, our_greedy):
    batch = _prompts(reference, loaded[0])
    together = our_greedy(*loaded, batch, 32)
    for row in range(len(ROWS)):
        single = _one_row(batch, row)
        expected = reference.greedy(model, single, 32)
        np.testing.assert_array_equal(together[row], expected[0])
        if row == 0:
            np.testing.assert_array_equal(our_greedy(*loaded, single, 32), expected)


@pytest.mark.parametrize("layout", "AB")
def test_layouts_a_and_b_hold_the_same_parameters(directory, loaded, tmp_path, layout):
    tensors = {
        name: tensor_files.read(t) for name, t in tensor_files.read_header(directory / "model.safetensors").items()
    }
    assert any(name.startswith("vision_tower.encoder.") for name in tensors), "transformers no longer writes layout C"
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if layout == "B":
            name = "model." + name.replace("language_model.model.", "language_model.")
        renamed[name] = tensor
    if layout == "B":
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"]
    tensor_files.write(tmp_path / "model.safetensors", renamed)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    config, params = checkpoints.load(tmp_path, "float32", progress=False)
    assert config == loaded[0]
    _assert_same(params, loaded[1])


def test_transformers_reads_what_we_write(reference, model, loaded, tmp_path):
    checkpoints.save(tmp_path, *loaded)
    again = reference.read_model(tmp_path)
    batch = reference.random_batch(loaded[0], ROWS)
    np.testing.assert_array_equal(reference.logits(again, batch), reference.logits(model, batch))


@pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="the shipped model is not in assets/tiny")
@pytest.mark.parametrize("prompt", ("caption en", "detect red circle"))
def test_the_shipped_model_answers_the_same_in_transformers(reference, prompt):
    picture = Image.new("RGB", (200, 160), (225, 230, 235))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 30, 80, 90), fill=(215, 35, 40))
    draw.rectangle((120, 70, 180, 130), fill=(40, 70, 200))
    ours = paligemma_jax.load(TINY, dtype="float32")
    output = ours.generate(picture, prompt, max_new_tokens=64)[0]
    assert output.finish_reason == "eos" and len(output.tokens) > 1
    expected = reference.greedy(reference.read_model(TINY), ours.processor(picture, prompt), 64)
    np.testing.assert_array_equal(output.tokens, expected[0])


def _assert_same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
