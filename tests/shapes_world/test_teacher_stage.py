import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.shapes_world import teacher_stage as stage
from paligemma_jax.shapes_world.pool import scene_record
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES, scene_at

SHAPE = np.array([[0, 3, -1, -1], [1, 1, 1, -1]], np.int8)
COLOR = np.array([[0, 4, -1, -1], [2, 2, 3, -1]], np.int8)


def test_captions_count_what_there_is():
    assert stage.captions(SHAPE, COLOR) == [
        "a red circle and a purple star",
        "two blue squares and a yellow square",
    ]


def test_phrases_are_true_of_what_they_name():
    names, truths = stage.phrases(), stage.phrase_truths(SHAPE, COLOR)
    assert truths.shape == (2, len(names)) and len(set(names)) == len(names)
    first, second = ({name for name, true in zip(names, row, strict=True) if true} for row in truths)
    assert first == {
        *("circle", "star", "red", "purple", "red circle", "purple star", "a red circle", "a purple star"),
    }
    assert {"square", "blue", "yellow square", "a blue square"} <= second and "red square" not in second


def test_the_vocabulary_has_a_token_for_each_word_and_every_byte():
    tokenizer = stage.train_vocabulary([*stage.phrases(), "two red circles and a blue star, three green squares"])
    rows = tokenizer.encode(["a red circle", "xyz é 漢", ""])
    assert list(map(len, rows))[::2] == [5, 2] and len(rows[1]) > 8
    assert max(tokenizer.vocabulary.values()) == len(tokenizer.vocabulary) - 1
    config = stage.geometry(tokenizer)
    assert config.text.vocab_size == len(tokenizer.vocabulary) and config.projection_dim == stage.PROJECTION


@pytest.fixture(scope="module")
def pool():
    records = [scene_record(scene_at(5, index), stage.VISION.image_size, stage.VISION.patch_size) for index in range(6)]
    return {key: np.stack([record[key] for record in records]) for key in records[0]}


def test_batches_are_a_function_of_the_step(pool):
    tokenizer = stage.train_vocabulary(stage.phrases())
    batches = stage.CaptionBatches(pool, tokenizer, 4, 0)
    first, again, other = batches(3), batches(3), batches(4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["pixels"] != other["pixels"]).any()
    assert first["pixels"].shape == (4, 120, 120, 3) and first["captions"].shape == (4, stage.TEXT.context)
    assert first["kind"].shape == first["supervised"].shape == (4, 64)
    assert first["kind"].max() == len(SHAPES) * len(COLORS) and (first["kind"] < 30).any()


@pytest.mark.slow
def test_the_loss_counts_equal_captions_as_right(pool):
    """Of a batch with a picture twice, exchanging the two changes nothing; other captions do."""
    tokenizer = stage.train_vocabulary(stage.phrases())
    model = stage.TeacherTraining(stage.geometry(tokenizer))
    ids = tokenizer(stage.phrases(), 8)
    params = model.init(jax.random.key(0), jnp.zeros((1, 120, 120, 3)), ids[:1], ids)["params"]
    batch = stage.CaptionBatches(pool, tokenizer, 4, 0)(0)
    twice = {name: values[[0, 1, 0, 2]] for name, values in batch.items()}
    loss = jax.jit(functools.partial(stage.teacher_loss, model, ids))
    same = {name: values[[2, 1, 0, 3]] for name, values in twice.items()}
    wrong = twice | {"captions": twice["captions"][[1, 0, 2, 3]]}
    value = float(loss(params, twice)[0])
    assert np.isclose(float(loss(params, same)[0]), value, rtol=1e-5)
    assert not np.isclose(float(loss(params, wrong)[0]), value, rtol=1e-5)
