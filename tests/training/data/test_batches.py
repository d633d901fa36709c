"""Batches: every example once in an epoch, fixed shapes, and the same whoever makes them."""

import json

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError, DataError, ImageError, PromptError
from paligemma_jax.training.data import Batches, Example, check_pictures, make_batches, open_data
from paligemma_jax.training.data.augment import Augmentation

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


def _same(first, second):
    assert first.keys() == second.keys()
    for key, values in first.items():
        np.testing.assert_array_equal(values, second[key])


def test_batches_are_the_same_whoever_makes_them(examples, processor, folder):
    """Any number of threads; hosts, whose rows are put one after another; any order in which steps are asked for."""
    pair = Example((str(folder / "0.png"), str(folder / "5.png")), "caption en", "two stars")
    data = [*examples, pair, pair]
    augmentation = Augmentation(("flip", "crop", "scale", "color"), 3)
    options = {"batch_size": 4, "epochs": 3, "augmentation": augmentation}
    one = lay_out(data, processor, **options, num_threads=1)
    many = lay_out(data, processor, **options, num_threads=7)
    hosts = [lay_out(data, processor, **options, host_index=i, host_count=2) for i in range(2)]
    for step in (3, 0, 5, 1, 2, 4):
        batch = one(step)
        _same(batch, many(step))
        parts = [host(step) for host in hosts]
        slots = parts[1]["image_slots"]  # of its own pictures
        slots[slots >= 0] += len(parts[0]["pixels"]) * processor.config.vision.num_tokens
        _same(batch, {key: np.concatenate([part[key] for part in parts]) for key in batch})
    with pytest.raises(ConfigError, match="batch_size=4 is not divisible by 3 hosts"):
        lay_out(data, processor, **options, host_count=3)


def test_weights_decide_how_often_examples_are_shown(folder, processor):
    for name, count in (("a", 4), ("b", 2)):
        lines = [json.dumps({**LINE, "suffix": f"{name} {i}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    data = open_data(f"{folder / 'a.jsonl'} ; 0.5 {folder / 'b.jsonl'}")
    batches = lay_out(data, processor, batch_size=5, epochs=4)
    shown = [example.suffix for step in range(len(batches)) for example in batches.examples(step)]
    assert len(batches) == 4 and {shown.count(f"a {i}") for i in range(4)} == {4}
    assert {shown.count(f"b {i}") for i in range(2)} == {2}
    with pytest.raises(DataError, match="6 examples, by their weights, and epochs=4 do not fill one batch of 21"):
        lay_out(data, processor, batch_size=21)


def test_no_picture_token_is_ever_cut_off(examples, processor, folder):
    """However long the texts: what has no room is refused."""
    long = Example((str(folder / "0.png"), str(folder / "5.png")), "caption en", "a red star" * 4)
    batches = lay_out([*examples, long], processor, text_length=60)
    per_picture = processor.config.vision.num_tokens
    for step in range(len(batches)):
        batch = batches(step)
        for row, example in enumerate(batches.examples(step)):
            slots = batch["image_slots"][row]
            assert (slots >= 0).sum() == per_picture * len(example.images)
            assert batch["length"][row] - batch["prefix_length"][row] >= 1  # something is supervised
            assert batch["tokens"][row][batch["length"][row] - 1] == processor.tokenizer.eos_id
    with pytest.raises(DataError, match=r"has \d+ tokens, more than text_length=12"):
        lay_out([*examples, long], processor, text_length=12)


def test_only_texts_that_may_be_too_long_are_tokenized(examples, processor, monkeypatch):
    counted = []
    count = type(processor).count_suffix
    monkeypatch.setattr(type(processor), "count_suffix", lambda self, text: counted.append(text) or count(self, text))
    longest = max(len(example.suffix) for example in examples)
    batches = lay_out(examples, processor, text_length=60)
    assert len(counted) <= len(examples)
    assert batches.num_answers == max(count(processor, example.suffix) for example in examples) <= longest + 1


def test_mirrored_texts_have_room_too(examples, processor):
    """Where "left" is fewer tokens than "right"."""
    texts = [f"the {side} star" for side in ("left", "right")]
    sizes = [processor.count_suffix(text) for text in texts]
    for text in texts:
        data = [Example(examples[0].images, "caption en", text)] * 3
        batches = lay_out(data, processor, augmentation=Augmentation(("flip",), 0))
        assert batches.num_answers == max(sizes)


def test_the_next_batch_is_begun_while_one_is_used(examples, processor, monkeypatch):
    begun = []
    row = Batches.row
    monkeypatch.setattr(Batches, "row", lambda self, counter: begun.append(counter) or row(self, counter))
    batches = lay_out(examples, processor, batch_size=2, num_threads=1)
    batches(4)
    batches(5)
    assert set(range(8, 12)) <= set(begun) <= set(range(8, 14))  # of steps 4 and 5, and perhaps of 6


def test_a_sample_of_very_many_pictures_is_checked(examples, processor, monkeypatch, capsys):
    monkeypatch.setattr("paligemma_jax.training.data.examples._ALL", 5)
    monkeypatch.setattr("paligemma_jax.training.data.examples._SAMPLE", 2)
    bad = Example(("none.png",), "caption en", "a")
    check_pictures([examples[0], bad, bad, bad, bad, examples[5]], processor.image_settings)
    assert "the pictures of 2 of 6 examples are read; run=check reads all" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        check_pictures([examples[0], examples[1], bad], processor.image_settings)


def test_a_token_that_the_model_does_not_have_is_named_with_its_line(opened, processor, monkeypatch):
    """Also in short texts, when the tokenizer has such tokens."""
    examples = opened(LINE | {"suffix": "a long red star"}, LINE | {"suffix": "odd"})
    count = type(processor).count_suffix

    def count_suffix(self, suffix):
        if suffix == "odd":
            raise PromptError("<odd> is id 9999 of the tokenizer, but the model has 9 rows: leave it out")
        return count(self, suffix)

    monkeypatch.setattr(type(processor), "count_suffix", count_suffix)
    lay_out(examples, processor, batch_size=1, text_length=60)  # it is not looked at
    monkeypatch.setattr(type(processor.tokenizer), "name", lambda self, id_: "<odd>")
    with pytest.raises(DataError, match=r"line 2: <odd> is id 9999"):
        lay_out(examples, processor, batch_size=1, text_length=60)
