import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax import patch_vit
from paligemma_jax.errors import CheckpointError, ConfigError, ImageError
from paligemma_jax.patch_vit import Student, StudentConfig, weights
from paligemma_jax.patch_vit.student import neighbour_mask
from tests.patch_vit import reference
from tests.patch_vit.pt_writer import Named, checkpoint, write_pt
from tests.patch_vit.small import random_tree


def state_of(student: Student) -> dict[str, np.ndarray]:
    return {weights.student_key(path): np.asarray(x) for path, x in flatten_dict(student.params, sep="/").items()}


def pixels_of(student: Student, count: int, seed: int = 0) -> np.ndarray:
    side = student.config.image_size
    return np.random.default_rng(seed).normal(size=(count, side, side, 3)).astype(np.float32)


def test_every_output_is_that_of_the_specification(student):
    pixels, cfg = pixels_of(student, 3), student.config
    options = {"num_heads": cfg.num_heads, "masked": cfg.masked, "same_norm": cfg.same_norm}
    expected = [reference.patch_vit(state_of(student), picture, **options) for picture in pixels]
    embeddings, probabilities, pooled = map(np.stack, zip(*expected, strict=True))
    found, shares = student.embed(pixels)
    assert found.dtype == shares.dtype == np.float32
    np.testing.assert_allclose(student.embed_patches(pixels), embeddings, atol=1e-5)
    np.testing.assert_allclose(shares, probabilities, atol=1e-5)
    np.testing.assert_allclose(found, pooled, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_full_size_is_that_of_the_specification(plain):
    config = StudentConfig(masked=not plain, same_norm=not plain, has_scale=not plain)
    student = Student(config, random_tree(weights.student_shapes(config)))
    pixels = pixels_of(student, 1)
    options = {"num_heads": config.num_heads, "masked": config.masked, "same_norm": config.same_norm}
    embeddings, probabilities, pooled = reference.patch_vit(state_of(student), pixels[0], **options)
    size = abs(embeddings).max()
    np.testing.assert_allclose(student.embed_patches(pixels)[0] / size, embeddings / size, atol=1e-5)
    found, shares = student.embed(pixels)
    np.testing.assert_allclose(shares[0], probabilities, atol=1e-5)
    np.testing.assert_allclose(found[0] / size, pooled / size, atol=1e-5)


@pytest.mark.parametrize("same_norm", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_mask_and_norm_are_independent(masked_student, masked, same_norm):
    config = dataclasses.replace(masked_student.config, masked=masked, same_norm=same_norm)
    student = Student(config, masked_student.params)
    pixels = pixels_of(student, 1)
    options = {"num_heads": config.num_heads, "masked": masked, "same_norm": same_norm}
    expected = reference.patch_vit(state_of(student), pixels[0], **options)
    np.testing.assert_allclose(student.embed_patches(pixels)[0], expected[0], atol=1e-5)


def test_the_scale_is_clamped_from_above_only(masked_student):
    for scale, norm in ((25.0, 10.0), (0.25, 0.25), (-2.0, 2.0)):
        params = {**masked_student.params, "scale": np.array([scale], np.float32)}
        patches = Student(masked_student.config, params).embed_patches(pixels_of(masked_student, 2))
        np.testing.assert_allclose(np.linalg.norm(patches, axis=-1), norm, rtol=1e-5)


def test_the_mask_lets_see_neighbours_only():
    mask = neighbour_mask(8)
    assert mask.dtype == bool and mask.shape == (64, 64) and (mask == mask.T).all() and mask.diagonal().all()
    counts = mask.sum(axis=1).reshape(8, 8)
    expected = np.full((8, 8), 9)
    expected[[0, -1]] = expected[:, [0, -1]] = 6
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(neighbour_mask(4)[5].reshape(4, 4)[:3, :3], True)
    np.testing.assert_array_equal(mask, reference.mask(8) == 0)


def test_a_patch_beyond_the_reach_of_all_layers_changes_nothing(masked_student):
    """Two layers, so two steps; the last patch is three away from the first."""
    first = pixels_of(masked_student, 1)
    second = first.copy()
    second[:, -5:, -5:] += 1.0
    a, b = (masked_student.embed_patches(x)[0].reshape(4, 4, -1) for x in (first, second))
    changed = np.abs(a - b).max(axis=-1) > 1e-6
    assert changed[1:, 1:].all() and not changed[0].any() and not changed[:, 0].any()


@pytest.mark.parametrize("plain, count, tensors", [(False, 21_391_361, 79), (True, 21_391_360, 78)])
def test_full_size_has_the_parameters_and_names_of_the_original(plain, count, tensors):
    config = StudentConfig(masked=not plain, same_norm=not plain, has_scale=not plain)
    shapes = {weights.student_key(path): shape for path, shape in weights.student_shapes(config).items()}
    assert len(shapes) == tensors and sum(int(np.prod(shape)) for shape in shapes.values()) == count
    names = {"attn.in_proj_weight": (1584, 528), "attn.in_proj_bias": (1584,), "attn.out_proj.weight": (528, 528)}
    names |= {"attn.out_proj.bias": (528,), "mlp.c_fc.weight": (2112, 528), "mlp.c_fc.bias": (2112,)}
    names |= {"mlp.c_proj.weight": (528, 2112), "mlp.c_proj.bias": (528,)}
    names |= {f"ln_{i}.{part}": (528,) for i in (1, 2) for part in ("weight", "bias")}
    expected = {f"transformer.resblocks.{i}.{name}": shape for i in range(6) for name, shape in names.items()}
    expected |= {"conv1.weight": (528, 3, 28, 28), "positional_embedding": (64, 528)} | (
        {} if plain else {"scale": (1,)}
    )
    expected |= {
        f"{norm}.{part}": (n,) for norm, n in (("ln_pre", 528), ("ln_post", 512)) for part in ("weight", "bias")
    }
    assert shapes == expected


def test_rows_are_independent_of_their_batch(student):
    pixels = pixels_of(student, 70)
    whole, parts = student.embed_patches(pixels), [student.embed_patches(pixels[i : i + 3]) for i in (0, 40, 67)]
    for part, start in zip(parts, (0, 40, 67), strict=True):
        np.testing.assert_allclose(part, whole[start : start + 3], atol=1e-5)
    assert student.embed_patches(pixels[:0]).shape == (0, 16, 12)


def test_pictures_are_squeezed(masked_student):
    pixels = masked_student.preprocess([np.zeros((7, 40, 3), np.uint8), np.full((30, 10), 255, np.uint8)])
    assert pixels.shape == (2, 20, 20, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, 3, 4], [-1.7922626, -1.7520971, -1.4802198], rtol=1e-5)
    with pytest.raises(ImageError, match=r"expected \[B, 20, 20, 3\]"):
        masked_student.embed(pixels[0])


def test_pt_to_safetensors_to_student_is_bit_identical(student, tmp_path):
    path = write_pt(tmp_path / "x.pt", checkpoint(state_of(student)))
    first = patch_vit.load(path)
    first.save(tmp_path / "saved")
    second = patch_vit.load(tmp_path / "saved")
    assert first.config == second.config
    assert (first.config.masked, first.config.same_norm) == (student.config.masked, student.config.same_norm)
    for params in (first.params, second.params):
        jax.tree.map(np.testing.assert_array_equal, params, student.params)
    pixels = pixels_of(student, 2)
    np.testing.assert_array_equal(second.embed_patches(pixels), first.embed_patches(pixels))


def test_what_a_file_does_not_say_can_be_said(masked_student, tmp_path):
    path = write_pt(tmp_path / "x.pt", checkpoint(state_of(masked_student)))
    assert not patch_vit.load(path, same_norm=False).config.same_norm
    assert not patch_vit.load(path, masked=False).config.masked
    state = {key: value for key, value in state_of(masked_student).items() if key != "scale"}
    plain = write_pt(tmp_path / "plain.pt", checkpoint(state))
    with pytest.raises(ConfigError, match="same_norm needs the parameter `scale`"):
        patch_vit.load(plain, same_norm=True)


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            lambda state: state.pop("transformer.resblocks.1.mlp.c_fc.bias"),
            "1 missing: transformer.resblocks.1.mlp.c_fc",
        ),
        (lambda state: state.pop("conv1.weight"), "conv1.weight is missing"),
        (lambda state: state.update(extra=np.zeros(3, np.float32)), "1 unexpected: extra"),
        (lambda state: state.update({"ln_pre.bias": np.zeros(3, np.float32)}), "1 mis-shaped: ln_pre.bias"),
        (lambda state: state.update({"conv1.weight": np.zeros(3, np.float32)}), "is no checkpoint of the patch ViT"),
    ],
)
def test_a_checkpoint_that_lacks_keys_is_refused(masked_student, tmp_path, change, problem):
    state = state_of(masked_student)
    change(state)
    with pytest.raises(CheckpointError, match=problem) as error:
        patch_vit.load(write_pt(tmp_path / "x.pt", checkpoint(state)))
    assert "\n" not in str(error.value)


def test_other_contents_are_refused(tmp_path):
    for value in ({"epoch": 1}, [1, 2], {"model_state_dict": {"a": 1}}, Named("_types", "Teacher", "x")):
        with pytest.raises(CheckpointError, match="no model_state_dict of tensors"):
            patch_vit.load(write_pt(tmp_path / "x.pt", value))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"model_type": "clip"}, "is of a 'clip' model, not of a 'patch_vit'"),
        ({"image_size": "20"}, "image_size is '20', expected a positive integer"),
        ({"patch_size": 7}, "image_size 20 is no multiple of patch_size 7"),
        ({"masked": 1}, "masked is 1, expected true or false"),
        ({"depth": 2}, "'depth' is unknown"),
        ({"mlp_dim": 21}, "mis-shaped"),
    ],
)
def test_a_config_that_cannot_be_is_refused(masked_student, tmp_path, change, problem):
    masked_student.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError), match=problem):
        patch_vit.load(tmp_path)
