import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.shapes_world import language_stage
from paligemma_jax.shapes_world.language_stage import (
    QuestionBatches,
    answer_text,
    init_location_embeddings,
    language_loss,
    make_optimizer,
    scale_updates,
    soft_location_targets,
)
from paligemma_jax.shapes_world.questions import Question
from paligemma_jax.shapes_world.vision_stage import DenseHead, dense_losses, normalize
from paligemma_jax.tasks.detection import parse


@pytest.fixture(scope="module")
def batches(pool, codes, processor):
    return QuestionBatches(pool, codes, processor, seed=1, easy_steps=3)


@pytest.mark.parametrize("sigma", [0.5, 5.0])
def test_soft_targets_peak_at_the_truth(sigma):
    table = soft_location_targets(sigma)
    assert table.shape == (1024, 1024) and table.min() >= 0
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(table.argmax(axis=1), np.arange(1024))
    assert table[500, 501] == table[500, 499] < table[500, 500]
    spread = np.sqrt(((np.arange(1024) - 500) ** 2 * table[500]).sum())
    assert spread == pytest.approx(sigma, rel=0.2)


def test_locations_start_as_a_smooth_curve():
    table = jax.random.normal(jax.random.key(0), (1100, 24)) * 0.3
    start = 40
    smooth = np.asarray(init_location_embeddings(table, start, jax.random.key(1)))
    others = np.r_[:start, start + 1024 : 1100]
    np.testing.assert_array_equal(smooth[others], np.asarray(table)[others])
    rows = smooth[start : start + 1024]
    assert rows.std() == pytest.approx(float(table.std()), rel=0.05)
    neighbours, strangers = (np.linalg.norm(rows[k:] - rows[:-k], axis=1) for k in (1, 200))
    assert neighbours.max() < strangers.min()


def test_answers_read_back(pool, codes):
    row = int(np.argmax((pool["shape"] >= 0).sum(axis=1)))
    boxes, row_codes = pool["box"][row], codes[0, row]
    objects = ((2, "red star"), (0, "circle"), (3, "circle"))
    for task in ("detect", "segment"):
        text = answer_text(Question(f"{task} red star ; circle", task=task, objects=objects), boxes, row_codes)
        found, dropped = parse(text, (1, 1))
        assert not dropped and [item.label for item in found] == [label for _, label in objects]
        for item, (place, _) in zip(found, objects, strict=True):
            y0, x0, y1, x1 = boxes[place]
            np.testing.assert_allclose(item.box, (x0, y0, x1, y1), atol=0.5 / 1023 + 1e-6)
            assert item.codes == (tuple(row_codes[place]) if task == "segment" else None)
    assert answer_text(Question("detect cat", task="detect"), boxes, row_codes) == ""
    assert answer_text(Question("answer en how many?", "3"), boxes, row_codes) == "3"


def test_batches_are_a_function_of_the_step(batches):
    jax.tree.map(np.testing.assert_array_equal, batches(5), dataclasses.replace(batches)(5))
    assert (batches(6)["pixels"] != batches(7)["pixels"]).any()


def test_batches_begin_easy_and_ask_for_masks_now_and_then(batches, pool, processor, tokenizer):
    for step, most in ((0, 1), (2, 1), (5, 2), (6, 4)):
        rows = batches._rows(language_stage.TEXT_BATCH.num_images, step)
        counts = (pool["shape"][rows] >= 0).sum(axis=1)
        assert counts.max() <= most and (most < 4 or counts.max() > 2)
    for step in range(9, 12):
        batch = batches(step)
        num_soft = processor.config.vision.num_tokens
        spec = language_stage.SEGMENT_BATCH if step == 11 else language_stage.TEXT_BATCH
        assert batch["tokens"].shape == (spec.num_images * spec.num_questions, num_soft + spec.text_length)
        assert len(batch["pixels"]) == spec.num_images and len(batch["dense"]["shape"]) == spec.num_images
        prefixes = {
            tokenizer.decode(row[num_soft:length]).split()[0]
            for row, length in zip(batch["tokens"], batch["prefix_length"], strict=True)
        }
        assert prefixes == set(spec.tasks)


def test_scenes_of_three_and_more_come_twice_as_often(batches, pool):
    counts = (pool["shape"] >= 0).sum(axis=1)
    hard = counts > 2
    per_epoch = (len(counts) + hard.sum()) // language_stage.TEXT_BATCH.num_images
    first = -(-6 // per_epoch) * per_epoch  # of the first epoch that is not easy
    rows = np.concatenate(
        [batches._rows(language_stage.TEXT_BATCH.num_images, first + step) for step in range(per_epoch)]
    )
    shown = np.bincount(rows, minlength=len(counts))
    assert shown[~hard].max() == 1 and shown[hard].max() == 2
    assert abs(shown[hard].mean() - 2 * shown[~hard].mean()) < 0.5


def test_answers_belong_to_their_pictures(batches, pool):
    """Boxes of a `detect` lie where the picture, which may be mirrored, has them."""
    batch = batches(9)
    slots, decode = batch["image_slots"], batches.processor.tokenizer.decode
    checked = 0
    for row in range(len(slots)):
        picture = batch["pixels"][slots[row, 0] // 16]
        start = [np.abs(pool["pixels"][:, :, ::turn].astype(int) - picture).max(axis=(1, 2, 3)) for turn in (1, -1)]
        turn, source = np.argwhere(np.array(start) == 0)[0]
        text = decode(batch["tokens"][row, batch["prefix_length"][row] : batch["length"][row]])
        y0, x0, y1, x1 = pool["box"][source].T
        boxes = np.stack([1 - x1, y0, 1 - x0, y1] if turn else [x0, y0, x1, y1], axis=1)
        for item in parse(text, (1, 1))[0]:
            assert np.abs(boxes - item.box).max(axis=1).min() < 1e-3
            checked += 1
    assert checked > 10


@pytest.fixture(scope="module")
def small_batch(processor, pool):
    texts = [
        ("caption en", "a red circle"),
        ("detect circle", "<loc0000><loc0500><loc0600><loc1023> circle"),
        ("detect star", ""),
    ]
    groups = [[0], [1], [1]]
    layout = processor.layout(groups, [p for p, _ in texts], [s for _, s in texts], pad_to=16 + 24)
    dense = {
        "shape": np.full((2, 16), 5, np.int32),
        "color": np.full((2, 16), 6, np.int32),
        "box": np.zeros((2, 16, 4), np.float32),
        "count": np.zeros((2, 16, 4), np.uint8),
        "rank": np.zeros((2, 16, 4), np.uint8),
        "centre": np.arange(8).reshape(2, 4),
        "codes": np.tile(np.array([5, 7, -1, -1]).reshape(1, 4, 1), (2, 1, 16)),
        "foreground": np.arange(32).reshape(2, 16) % 3 == 0,
        "supervised": np.ones((2, 16), bool),
    }
    fields = ("tokens", "image_slots", "prefix_length", "length")
    return {"pixels": pool["pixels"][:2], **{k: getattr(layout, k) for k in fields}, "dense": dense}


def test_loss_is_what_the_full_forward_pass_gives(small, random_params, small_batch, tokenizer):
    model, head, soft = PaliGemma(small), DenseHead(), soft_location_targets(3.0)
    params, batch = random_params(small), small_batch
    pixels = normalize(batch["pixels"])

    @jax.jit
    def reference(params):
        features = model.apply({"params": params}, pixels, method=lambda m, x: m.vision_tower(x))
        sequence = (batch[k] for k in ("tokens", "image_slots", "prefix_length", "length"))
        return model.apply({"params": params}, pixels, *sequence), features

    logits, features = reference(params)
    centre = batch["dense"]["centre"]
    head_params = head.init(jax.random.key(3), features, centre)["params"]
    dense, _ = dense_losses(head.apply({"params": head_params}, features, centre), batch["dense"])
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses, right, off, start = [], [], [], tokenizer.loc_start
    for row, (first, end) in enumerate(zip(batch["prefix_length"], batch["length"], strict=True)):
        for place in range(first, end):
            target, said = batch["tokens"][row, place], log_probs[row, place - 1]
            if start <= target < start + 1024:
                losses.append(-(soft[target - start] * said[start : start + 1024]).sum())
                off.append(abs(said.argmax() - target) / 1024)
            else:
                losses.append(-said[target])
                right.append(said.argmax() == target)
    assert len(off) == 4 and len(right) > 6
    loss_fn = jax.jit(lambda p: language_loss(model, head, jnp.asarray(soft), start, 0.5, p, batch))
    loss, metrics = loss_fn({**params, "dense_head": head_params})
    assert float(loss) == pytest.approx(np.mean(losses) + 0.5 * float(dense), rel=1e-4)
    assert float(metrics["word_acc"]) == pytest.approx(np.mean(right))
    assert float(metrics["loc_error"]) == pytest.approx(np.mean(off), rel=1e-4)


def test_matrices_alone_are_decayed():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(100, 0.1, warmup=1)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(2):  # the first learning rate of a warm-up is 0
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert (updates["kernel"] < 0).all() and not updates["bias"].any()


def test_one_part_moves_slower():
    params = {"vision_tower": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    optimizer = optax.adam(0.1)
    plain, _ = optimizer.update(params, optimizer.init(params), params)
    optimizer = scale_updates(optimizer, "vision_tower", 0.25)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["vision_tower"]["w"], 0.25 * plain["vision_tower"]["w"])
    np.testing.assert_array_equal(updates["head"]["w"], plain["head"]["w"])
