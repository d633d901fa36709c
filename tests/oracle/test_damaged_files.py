"""Damaged files that still load: read as transformers reads them, wherever it does."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pj
from tests.checkpoints.mutate import damaged_copy, read

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
TEXTS = ["detect a red circle ; <loc0012><seg003> é\n", "caption en", "a  b\t\tc", "<b>é</b> 日本 ; 3.5"]
_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
}
_TEXT = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
_GEMMA2 = {
    "query_scalar": "query_pre_attn_scalar",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}


def their_config(directory: Path):
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig.from_pretrained(directory)


def their_processor(directory: Path):
    from transformers import PaliGemmaProcessor

    return PaliGemmaProcessor.from_pretrained(directory, use_fast=False)


def attempt(function, directory: Path):
    """What transformers reads, None where it does not."""
    try:
        return function(directory)
    except Exception:
        return None


def compare_configs(ours: pj.PaliGemma, theirs, what: str) -> None:
    text, vision = dataclasses.asdict(ours.config.text), dataclasses.asdict(ours.config.vision)
    assert f"gemma{2 if text['version'] == 2 else ''}" == theirs.text_config.model_type, what
    for name, their_name in _VISION.items():
        assert vision[name] == getattr(theirs.vision_config, their_name), (what, name)
    for name, their_name in (_TEXT | (_GEMMA2 if text["version"] == 2 else {})).items():
        assert text[name] == getattr(theirs.text_config, their_name), (what, name)
    assert text["rope_theta"] == theirs.text_config.rope_parameters["rope_theta"], what
    assert ours.config.image_token_id == theirs.image_token_id, what


def test_what_loads_is_what_transformers_reads(small_checkpoints, tmp_path):
    compared = 0
    for name, directory in small_checkpoints.items():
        shutil.copytree(directory, tmp_path / name)
        (tmp_path / name / "tokenizer.model").unlink()  # transformers 5 reads the JSON alone
    for seed in range(400):
        generation = ("gemma", "gemma2")[seed % 2]
        what = damaged_copy(tmp_path / generation, tmp_path / "copy", seed)
        ours = read(tmp_path / "copy")
        if isinstance(ours, str):
            continue
        if (config := attempt(their_config, tmp_path / "copy")) is not None:
            compare_configs(ours, config, what)
        if (processor := attempt(their_processor, tmp_path / "copy")) is None:
            continue
        compared += 1
        for text in TEXTS:
            ids = processor.tokenizer(text, add_special_tokens=False).input_ids
            assert ours.processor.tokenizer.encode(text) == ids, (what, text)
        pixels = processor.image_processor(Image.fromarray(PICTURE), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(
            ours.processor(PICTURE, "").pixels[0], pixels.transpose(1, 2, 0), atol=1e-5, err_msg=what
        )
    assert compared > 50
