"""Batches: every example once in an epoch, fixed shapes, and the same whoever makes them."""

import numpy as np
import pytest

from paligemma_jax.errors import DataError, ImageError
from paligemma_jax.training.data import Example, check_pictures, make_batches, open_data

LINE = {"image": "0.png", "prefix": "caption en", "suffix": "a star"}


@pytest.fixture
def examples(folder):
    return [Example((str(folder / f"{i}.png"),), "caption en", "a red star"[: 2 + i]) for i in range(6)]


def lay_out(examples, processor, **changes):
    settings = {"batch_size": 3, "epochs": 4, "text_length": 24, "seed": 0} | changes
    return make_batches(examples, processor, **settings)


def test_every_epoch_shows_each_example_once_in_a_new_order(examples, processor):
    batches = lay_out(examples, processor)
    assert len(batches) == 8
    epochs = []
    for epoch in range(4):
        rows = [batches(step) for step in (2 * epoch, 2 * epoch + 1)]
        epochs.append([round(float(grey), 2) for batch in rows for grey in batch["pixels"].mean(axis=(1, 2, 3))])
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 6 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    again, other = lay_out(examples, processor), lay_out(examples, processor, seed=1)
    for key, values in batches(5).items():
        np.testing.assert_array_equal(again(5)[key], values)
    assert any((batches(step)["pixels"] != other(step)["pixels"]).any() for step in range(3))


def test_shapes_are_the_same_whatever_a_batch_holds(examples, processor, folder):
    """Also with several pictures in some examples, and with one picture in several examples."""
    pair = Example((str(folder / "0.png"), str(folder / "5.png")), "caption en", "two stars")
    batches = lay_out([*examples, pair, pair], processor, batch_size=2, epochs=1)
    shapes = [{key: values.shape for key, values in batches(step).items()} for step in range(len(batches))]
    assert all(shape == shapes[0] for shape in shapes)
    assert shapes[0]["pixels"][0] == 4 and shapes[0]["tokens"] == (2, 2 * 16 + 24)
    for step in range(len(batches)):
        batch = batches(step)
        for row, examples_row in enumerate(batches.examples(step)):
            slots = batch["image_slots"][row]
            greys = batch["pixels"].mean(axis=(1, 2, 3))[slots[slots >= 0][::16] // 16]
            names = [int(image[-5]) for image in examples_row.images]
            np.testing.assert_allclose(greys, [40 * name / 127.5 - 1 for name in names], atol=0.01)


def test_the_longest_answer_has_room(examples, processor):
    batches = lay_out(examples, processor)
    longest = [(batch["length"] - batch["prefix_length"]).max() for batch in map(batches, range(2))]
    assert batches.num_answers == max(longest)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_length": 4}, r"'caption en' with its suffix has \d+ tokens, more than text_length=4"),
        ({"batch_size": 25}, "6 examples and epochs=4 do not fill one batch of 25: lower batch_size"),
        ({"text_length": 250}, "text_length=250 make 266 tokens, the model has 256 positions: lower one"),
    ],
)
def test_what_cannot_be_laid_out(examples, processor, changes, message):
    with pytest.raises(DataError, match=message):
        lay_out(examples, processor, **changes)


def test_all_pictures_are_checked_and_the_first_bad_one_is_named_with_its_line(write, folder, processor):
    (folder / "bad.png").write_bytes(b"no picture")
    good, bad = LINE, LINE | {"image": ["0.png", "bad.png"]}
    settings = processor.image_settings
    check_pictures(open_data(write(good, good)), settings)
    with pytest.raises(DataError, match=r"line 2: .*bad\.png is not a picture[^(]*$"):
        check_pictures(open_data(write(good, bad, bad)), settings)
    (folder / "worse.png").write_bytes((folder / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"line 1: .*worse\.png .*\(2 of 3 pictures cannot be read\)"):
        check_pictures(open_data(write(LINE | {"image": "worse.png"}, good, bad)), settings)
    for name in ("bad.png", "worse.png"):
        (folder / name).unlink()


def test_the_line_of_an_example_that_is_too_long_is_named(write, processor):
    examples = open_data(write(LINE, LINE | {"suffix": "a red star " * 9}))
    with pytest.raises(DataError, match=r"data\.jsonl line 2: 'caption en' with its suffix has \d+ tokens"):
        lay_out(examples, processor, text_length=12)


def test_a_damaged_picture_is_named_when_its_turn_comes(examples, processor, folder):
    batches = lay_out(examples, processor, epochs=1)
    (folder / "4.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"4\.png is not a picture"):
        [batches(step) for step in range(2)]
