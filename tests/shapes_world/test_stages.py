"""The stages that build the shipped model, in very small."""

import dataclasses

import numpy as np
import pytest

import paligemma_jax as pj
from configs import make_tiny
from paligemma_jax.errors import ConfigError
from paligemma_jax.shapes_world import pool, stages
from paligemma_jax.shapes_world.pool import scene_record


def recipe() -> stages.Recipe:
    """The one of configs/make_tiny.py, with few steps."""
    config = make_tiny.get_config()
    shipped = stages.Recipe(**{field.name: config[field.name] for field in dataclasses.fields(stages.Recipe)})
    return dataclasses.replace(shipped, mask_vae_steps=1, vision_steps=2, language_steps=4, easy_steps=0)


def test_the_tokenizer_knows_the_world(tokenizer):
    config = stages.model_config(tokenizer)
    tokenizer.check(config)
    assert config.text.vocab_size % 64 == 0 and config.text.vocab_size > config.image_token_id
    texts = {text for text in stages.sample_texts(1, 50) if text}
    assert texts == {text for text in stages.sample_texts(1, 50) if text} != set(stages.sample_texts(2, 50))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) <= len(text.split()) + 5
    assert tokenizer.decode(tokenizer.encode("ein Gruß, 你好")) == "ein Gruß, 你好"


def test_a_second_training_of_the_tokenizer_reads_the_first(tmp_path, tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    assert stages.train_tokenizer(tmp_path / "tokenizer.model", seed=9).to_bytes() == tokenizer.to_bytes()


def test_geometry_tells_apart_what_could_be_confused():
    vision, text = stages.VISION, stages.TEXT
    assert vision.width % vision.num_heads == 0 and vision.image_size % vision.patch_size == 0
    assert text.num_heads * text.head_dim != text.width and text.query_scalar != text.head_dim
    assert text.num_heads % text.num_kv_heads == 0 and 1 < text.num_kv_heads < text.num_heads
    assert vision.num_tokens < text.sliding_window < text.max_positions


def test_a_tokenizer_of_the_wider_world_knows_nothing():
    texts = set(stages.sample_texts(1, 60, wide_share=1.0))
    assert {"nothing", "nichts", "0"} <= texts
    assert not {"nothing", "nichts"} & set(stages.sample_texts(1, 60))


def test_mask_batches_have_their_share_of_turned_shapes(pool, monkeypatch):
    monkeypatch.setattr(stages, "rotated_masks", lambda rng, count, side: np.ones((count, side, side), bool))
    for share, count in ((0.0, 0), (0.75, 6), (1.0, 8)):
        masks = next(stages._mask_batches(pool, 0, 8, share))
        assert masks.shape == (8, 64, 64) and masks[:count].all() and len(masks[count:]) == 8 - count
        drawn = next(stages._mask_batches(pool, 0, 8, 0.0))
        np.testing.assert_array_equal(masks[count:], drawn[count:])


def test_a_folder_that_was_begun_otherwise_is_refused(tmp_path):
    stages._check_begun(tmp_path, recipe())
    stages._check_begun(tmp_path, dataclasses.replace(recipe(), language_steps=9))
    with pytest.raises(ConfigError, match=r"wide_share=0.5 is not possible: .* was begun with 0.0; give another"):
        stages._check_begun(tmp_path, dataclasses.replace(recipe(), wide_share=0.5))


@pytest.mark.parametrize("mask_vae", ["keep", "train"])
def test_the_mask_vae_of_the_start_is_kept_or_trained_on(tmp_path, monkeypatch, mixed_pool, mask_vae):
    """Once: a second call finds what the first one left. All views are encoded where there are wide scenes."""
    start, trained, encoded = tmp_path / "start", [], []
    start.mkdir()
    (start / "tokenizer.model").write_bytes(b"tokenizer")
    (start / "vae-oid.npz").write_bytes(b"start")
    monkeypatch.setattr(stages, "load_mask_vae", lambda path: path.read_bytes())
    monkeypatch.setattr(stages, "save_mask_vae", lambda path, params: path.write_bytes(params))

    def train(key, batches, steps, rate, params):
        trained.append((next(batches).shape, steps, rate, params))
        return b"trained"

    def encode(params, masks):
        encoded.append(params)
        return np.full((len(masks), 16), len(encoded))

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    monkeypatch.setattr(stages, "train_mask_vae", train)
    monkeypatch.setattr(stages.mask_vae, "encode", encode)
    monkeypatch.setattr(stages, "_MASK_BATCH", 256)
    monkeypatch.setattr(stages, "scene_pool", lambda *_: mixed_pool)
    monkeypatch.setattr(stages, "train_tokenizer", lambda *_: None)
    monkeypatch.setattr(stages, "model_config", lambda _: None)
    monkeypatch.setattr(stages, "train_vision", stop)
    changed = {"start_from": str(start), "mask_vae": mask_vae, "mask_vae_learning_rate": 3e-4, "wide_share": 0.75}
    for _ in range(2):
        with pytest.raises(Enough):
            stages.build(tmp_path / "work", tmp_path / "out", dataclasses.replace(recipe(), **changed))
    assert (tmp_path / "work/vae-oid.npz").read_bytes() == (b"start" if mask_vae == "keep" else b"trained")
    assert trained == ([] if mask_vae == "keep" else [((32, 64, 64), 1, 3e-4, b"start")])
    assert set(encoded) == {b"start" if mask_vae == "keep" else b"trained"} and len(encoded) == 8
    codes = np.load(tmp_path / "work/mask_codes.npy")
    assert codes.shape == (8, *mixed_pool["shape"].shape, 16)
    occupied = mixed_pool["shape"] >= 0
    assert all((codes[view][occupied] == view + 1).all() for view in range(8)) and not codes[:, ~occupied].any()


@pytest.mark.slow
def test_all_stages_and_then_none(tmp_path, monkeypatch, scenes, small):
    monkeypatch.setattr(stages, "VISION", small.vision)
    monkeypatch.setattr(stages, "TEXT", dataclasses.replace(small.text, max_positions=512))
    records = [scene_record(scene, 28, 7) for scene in scenes]
    drawn = {key: np.stack([record[key] for record in records]) for key in records[0]}
    monkeypatch.setattr(stages, "scene_pool", lambda *_: drawn)
    work, output = tmp_path / "work", tmp_path / "model"
    stages.build(work, output, recipe())
    model = pj.load(output, dtype="float32")
    assert model.config.vision == small.vision and (output / "vae-oid.npz").exists()
    assert len(model.generate(np.asarray(pool.draw(scenes[0])), ["caption en", "segment star"], 5)) == 2
    before = {path: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setattr(stages, "make_step", lambda *_: None)  # all steps are done
    monkeypatch.setattr(stages, "train_mask_vae", None)
    stages.build(work, output, recipe())
    assert {path: path.read_bytes() for path in output.iterdir()} == before

    monkeypatch.setattr(stages, "fit", lambda state, *_, **__: state)  # a second model starts where the first one is
    monkeypatch.setattr(stages, "make_step", lambda *_: None)
    stages.build(tmp_path / "more", tmp_path / "again", dataclasses.replace(recipe(), start_from=str(output)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: value for path, value in before.items()
    }
