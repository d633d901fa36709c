import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import DataError, ImageError
from paligemma_jax.training.data import Example, check_pictures, make_batches, read_jsonl


@pytest.fixture
def folder(tmp_path):
    """Pictures 0.png to 5.png, each of one grey."""
    for i in range(6):
        Image.new("RGB", (9, 5), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def write(folder):
    def write(*lines):
        file = folder / "data.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file.write_text(text, encoding="utf-8")
        return file

    return write


LINE = {"image": "0.png", "prefix": "caption en", "suffix": "a star"}


def test_examples_are_read_in_order(write, folder):
    several = {"image": ["1.png", "2.png"], "prefix": "detect été", "suffix": ""}
    found = read_jsonl(write(LINE, "", several))
    assert found[0] == Example((str(folder / "0.png"),), "caption en", "a star")
    assert found[1] == Example((str(folder / "1.png"), str(folder / "2.png")), "detect été", "")


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_a_line_ends_with_a_line_break_alone(write, folder, odd):
    """Others may stand inside a JSON string, as they are; a byte order mark is passed over."""
    texts = {"prefix": f"caption{odd}en", "suffix": f"a{odd}star"}
    line = json.dumps(LINE | texts, ensure_ascii=False).replace(json.dumps(odd)[1:-1], odd)
    file = write("\ufeff" + line + "\r", line)
    assert read_jsonl(file) == 2 * [Example((str(folder / "0.png"),), *texts.values())]


def test_prefixes_may_have_placeholders(write):
    """As they stand in files for other processors: the examples, and so the batches, are the same."""
    two = {**LINE, "image": ["1.png", "2.png"]}
    prefixes = ["<image>caption en", "<image> caption en\n", "<image><bos>caption en", "caption en\\n"]
    assert read_jsonl(write(*({**LINE, "prefix": prefix} for prefix in prefixes))) == 4 * read_jsonl(write(LINE))
    assert read_jsonl(write({**two, "prefix": "<image><image>caption en"})) == read_jsonl(write(two))
    with pytest.raises(DataError, match=r"line 2: a prompt begins with 2 <image> and has 1 image"):
        read_jsonl(write(LINE, {**LINE, "prefix": "<image><image>caption en"}))


def test_pictures_may_lie_elsewhere(write, tmp_path_factory, folder):
    file = tmp_path_factory.mktemp("elsewhere") / "data.jsonl"
    file.write_text(json.dumps(LINE))
    assert read_jsonl(file, image_root=folder) == read_jsonl(write(LINE))
    with pytest.raises(DataError, match=r"line 1 names .*0\.png, which is missing: set image_root"):
        read_jsonl(file)


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{oops", "line 2 is not JSON"),
        ("[1]", "line 2 holds a JSON list instead of an object"),
        ({**LINE, "image": "9.png"}, r"line 2 names .*9.png, which is missing"),
        ({**LINE, "image": []}, "line 2 needs image"),
        ({**LINE, "image": ["0.png", 3]}, "line 2 needs image"),
        ({**LINE, "suffix": None}, "line 2 needs image"),
        ({"image": "0.png", "prefix": "caption en"}, "line 2 needs image"),
        ({**LINE, "suffix": " "}, "line 2 has an empty suffix"),
        ({**LINE, "sufix": "a"}, "line 2 has an unknown key 'sufix': did you mean suffix"),
        ({**LINE, "id": 7}, "line 2 has an unknown key 'id': a line has image, prefix, suffix only"),
    ],
)
def test_a_bad_line_is_named(write, bad, message):
    with pytest.raises(DataError, match=message) as caught:
        read_jsonl(write(LINE, bad, LINE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\n\n", b"\xff\xfe{}", None])
def test_a_bad_file_is_named(tmp_path, content):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl (is empty|cannot be read)") as caught:
        read_jsonl(file)
    assert "\n" not in str(caught.value)


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
        for row, examples_row in enumerate(batches.order[step]):
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
    check_pictures(read_jsonl(write(good, good)), settings)
    with pytest.raises(DataError, match=r"line 2: .*bad\.png is not a picture[^(]*$"):
        check_pictures(read_jsonl(write(good, bad, bad)), settings)
    (folder / "worse.png").write_bytes((folder / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"line 1: .*worse\.png .*\(2 of 3 pictures cannot be read\)"):
        check_pictures(read_jsonl(write(LINE | {"image": "worse.png"}, good, bad)), settings)
    for name in ("bad.png", "worse.png"):
        (folder / name).unlink()


def test_the_line_of_an_example_that_is_too_long_is_named(write, processor):
    examples = read_jsonl(write(LINE, LINE | {"suffix": "a red star " * 9}))
    with pytest.raises(DataError, match=r"data\.jsonl line 2: 'caption en' with its suffix has \d+ tokens"):
        lay_out(examples, processor, text_length=12)


def test_a_damaged_picture_is_named_when_its_turn_comes(examples, processor, folder):
    batches = lay_out(examples, processor, epochs=1)
    (folder / "4.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"4\.png is not a picture"):
        [batches(step) for step in range(2)]
