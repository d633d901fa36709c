"""CLIP's handle on its own; the towers are compared with transformers' in tests/oracle."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paligemma_jax import patch_vit
from paligemma_jax.errors import CheckpointError, ConfigError, TokenizerError
from paligemma_jax.patch_vit import ClipConfig, ClipTextConfig, ClipVisionConfig, weights
from paligemma_jax.patch_vit.clip import ClipModel
from paligemma_jax.patch_vit.network import apply

_SIZES = {  # image size, patch, width, layers, mlp, heads of the image tower; width, layers, heads of the text tower
    "ViT-B/32": ((224, 32, 768, 12, 3072, 12), (512, 12, 8), 512, 151_277_313),
    "ViT-B/16": ((224, 16, 768, 12, 3072, 12), (512, 12, 8), 512, 149_620_737),
    "ViT-L/14": ((224, 14, 1024, 24, 4096, 16), (768, 12, 12), 768, 427_616_513),
}


@pytest.mark.parametrize("name", _SIZES)
def test_full_sizes_have_the_parameters_of_openai_s(name):
    vision, (width, layers, heads), projection, count = _SIZES[name]
    text = ClipTextConfig(width=width, num_layers=layers, mlp_dim=4 * width, num_heads=heads)
    shapes = weights.clip_shapes(ClipConfig(ClipVisionConfig(*vision, 1e-5), text, projection))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def pixels_of(clip, count):
    return np.random.default_rng(1).normal(size=(count, 24, 24, 3)).astype(np.float32)


def test_shapes_and_saved_clip(clip, tmp_path):
    pixels = pixels_of(clip, 3)
    attention, patches = clip.cls_attention(pixels), clip.self_self_attention_patches(pixels)
    assert clip.embed_image(pixels).shape == (3, 12) and attention.shape == (3, 9) and patches.shape == (3, 9, 12)
    assert (attention > 0).all() and (attention.sum(axis=1) < 1).all()
    clip.save(tmp_path)
    again = patch_vit.load_clip(tmp_path)
    assert again.config == clip.config and again.settings == clip.settings
    jax.tree.map(np.testing.assert_array_equal, again.params, clip.params)
    texts = ["a red circle", "", "two green stars"]
    np.testing.assert_array_equal(again.embed_text(texts), clip.embed_text(texts))


def test_a_text_is_embedded_alike_in_any_batch_and_padding(clip):
    texts = ["star", "a red circle and a blue square " * 5, "x" * 500]
    whole = clip.embed_text(texts)
    for text, row in zip(texts, whole, strict=True):
        np.testing.assert_allclose(clip.embed_text([text])[0], row, atol=1e-5)
    full = apply(ClipModel(clip.config), clip.params, clip.tokenizer(texts), method="embed_text")
    np.testing.assert_allclose(full, whole, atol=1e-5)
    assert clip.embed_text([]).shape == (0, 12)


def test_a_single_text_is_one_row_and_half_a_character_none(clip):
    np.testing.assert_array_equal(clip.embed_text("star"), clip.embed_text(["star"]))
    with pytest.raises(TokenizerError, match="a text cannot be read"):
        clip.embed_text(["\ud800"])


def test_the_teacher_s_width_has_to_be_the_student_s(clip, masked_student):
    patch_vit.check_pair(masked_student, clip)
    large = patch_vit.Clip(dataclasses.replace(clip.config, projection_dim=768), clip.params, clip.tokenizer)
    with pytest.raises(ConfigError, match=r"embeddings of 768 numbers, the student of 12: .* L/14 has 768"):
        patch_vit.check_pair(masked_student, large)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"model_type": "siglip"}, "is of a 'siglip' model"),
        ({"vision_config": {"hidden_size": 17}}, "hidden_size is no multiple"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu' is not one of"),
        ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0, expected a positive integer"),
        ({"text_config": {"vocab_size": 7}}, "the tokenizer has the id"),
        ({"projection_dim": 13}, "mis-shaped"),
        ({"text_config": []}, "must be objects|missing"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(clip, tmp_path, change, problem):
    clip.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError), match=problem):
        patch_vit.load_clip(tmp_path)


def test_a_student_is_no_clip(masked_student, tmp_path):
    masked_student.save(tmp_path)
    with pytest.raises(ConfigError, match="is of a 'patch_vit' model, not of 'clip'"):
        patch_vit.load_clip(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        patch_vit.load_clip(tmp_path / "config.json")


def test_pixels_settings_are_read_back_or_refused(clip, tmp_path):
    clip.save(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    for change, problem in (
        ({"size": {"shortest_edge": 32}}, "size is"),
        ({"do_resize": False}, "do_resize is False"),
        ({"image_mean": [1]}, "expected three numbers"),
        ({"image_std": [1, 0, 1]}, "image_std holds 0"),
        ({"resample": 0}, "resample is 0"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ConfigError, match=problem):
            patch_vit.load_clip(tmp_path)
    path.write_text(json.dumps(fields | {"do_center_crop": False, "size": {"height": 24, "width": 24}, "resample": 2}))
    settings = patch_vit.load_clip(tmp_path).settings
    assert not settings.crop and settings.resample == "bilinear"
