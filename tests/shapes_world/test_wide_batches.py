"""Batches of the language and the vision stage from scenes of the wider world."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.shapes_world import language_stage
from paligemma_jax.shapes_world.language_stage import SEGMENT_BATCH, TEXT_BATCH, QuestionBatches, answer_text
from paligemma_jax.shapes_world.pool import turn
from paligemma_jax.shapes_world.questions import caption, locate
from paligemma_jax.shapes_world.scenes import COLORS, MAX_OBJECTS, SHAPES
from paligemma_jax.shapes_world.vision_stage import dense_targets
from paligemma_jax.tasks.detection import parse

SHIPPED = Path(__file__).resolve().parents[2] / "assets/tiny/tokenizer.model"


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_file(SHIPPED)


@pytest.fixture(scope="module")
def codes(mixed_pool):
    """Codes of each view, which say which view it is."""
    shape = mixed_pool["shape"].shape
    return np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None], (8, *shape, 16))


@pytest.fixture(scope="module")
def batches(mixed_pool, codes, processor):
    return QuestionBatches(mixed_pool, codes, processor, seed=1, turned=True)


def test_the_shipped_tokenizer_can_say_what_is_new(shipped):
    for text in ("nothing", "nichts", "0", "5", "five red circles", "fünf rote Kreise"):
        ids = shipped.encode(text)
        assert shipped.decode(ids) == text and len(ids) <= 7


@pytest.mark.parametrize("color, shape", list(itertools.product(COLORS, SHAPES)))
def test_five_things_fit_a_batch(color, shape, shipped):
    """The longest answers: five of a kind, boxed and masked, asked for with another class; captions of five kinds."""
    kinds = [(color, shape)] * 5
    boxes, codes = np.tile([0.1, 0.2, 0.3, 0.4], (5, 1)), np.arange(80).reshape(5, 16)
    other = COLORS[COLORS.index(color) - 1]
    for task, spec in (("detect", TEXT_BATCH), ("segment", SEGMENT_BATCH)):
        question = locate(task, [f"{color} {shape}", f"{other} {shape}"], kinds, np.arange(5))
        answer = answer_text(question, boxes, codes)
        assert len(parse(answer, (1, 1))[0]) == 5
        assert len(shipped.encode(f"{question.prefix}\n{answer}")) + 2 <= spec.text_length
    several = [(c, shape) for c in COLORS if c != color]
    for language in ("en", "de"):
        assert len(shipped.encode(f"caption {language}\n{caption(several, language)}")) + 2 <= TEXT_BATCH.text_length


def test_empty_scenes_are_background_everywhere(mixed_pool, codes):
    empty = (mixed_pool["shape"] < 0).all(axis=1)
    assert empty.any() and mixed_pool["shape"].shape[1] == MAX_OBJECTS
    found = dense_targets({key: value[empty] for key, value in mixed_pool.items()}, codes[0][empty])
    assert found["supervised"].all() and not found["foreground"].any()
    assert (found["shape"] == len(SHAPES)).all() and (found["color"] == len(COLORS)).all()
    assert (found["codes"] == -1).all() and (found["centre"] == 0).all()


def test_centres_of_turned_pictures_are_patches_of_the_picture(mixed_pool, codes):
    turned = turn({k: v for k, v in mixed_pool.items() if k != "mask"}, np.arange(len(mixed_pool["shape"])) % 4)
    found = dense_targets(turned, codes[0])
    assert found["centre"].min() >= 0 and found["centre"].max() < 16


def test_empty_scenes_are_asked_about(batches, mixed_pool, tokenizer):
    said = []
    for step in (0, 1, 3, 4):
        batch = batches(step)
        rows = zip(batch["tokens"], batch["prefix_length"], batch["length"], strict=True)
        said += [tokenizer.decode(row[first : end - 1]) for row, first, end in rows]
    assert {"nothing", "nichts"} & set(said)


def test_mask_batches_show_each_scene_twice_turned(batches, tokenizer):
    """With boxes and codes of the view that is shown."""
    num_soft = batches.processor.config.vision.num_tokens
    batch = batches(2)
    pixels = batch["pixels"]
    assert len(pixels) == SEGMENT_BATCH.num_images
    for first, second in pixels.reshape(-1, 2, *pixels.shape[1:]):
        assert sum(np.array_equal(np.rot90(first, k), second) for k in (1, 2, 3)) == 1
    shown = set()
    for i, (row, start, end) in enumerate(zip(batch["tokens"], batch["prefix_length"], batch["length"], strict=True)):
        assert tokenizer.decode(row[num_soft:start]).startswith("segment")
        views = {code for item in parse(tokenizer.decode(row[start:end]), (1, 1))[0] for code in item.codes}
        picture = i // SEGMENT_BATCH.num_questions
        assert len(views) <= 1 and views <= set(batch["dense"]["codes"][picture].ravel().tolist())
        shown |= views
    assert len(shown) > 4
    assert max(shown) < 8


def test_only_mask_batches_are_turned(batches, mixed_pool, monkeypatch):
    monkeypatch.setattr(language_stage, "turn", None)
    assert set(np.unique(batches(0)["dense"]["codes"])) <= {-1, 0, 1}  # as drawn and mirrored
    with pytest.raises(TypeError):
        batches(2)
