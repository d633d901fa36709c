"""The stages that build the shipped model, in very small."""

import dataclasses

import numpy as np
import pytest

import paligemma_jax as pj
from configs import make_tiny
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
