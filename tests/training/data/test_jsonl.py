"""JSON lines: what is read, and what is refused with its line."""

import json

import pytest

from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.training.data import Example, open_data


def open_list(*args, **options):
    return list(open_data(*args, **options))


LINE = {"image": "0.png", "prefix": "caption en", "suffix": "a star"}


def test_examples_are_read_in_order(write, folder):
    several = {"image": ["1.png", "2.png"], "prefix": "detect été", "suffix": ""}
    found = open_list(write(LINE, "", several))
    assert found[0] == Example((str(folder / "0.png"),), "caption en", "a star")
    assert found[1] == Example((str(folder / "1.png"), str(folder / "2.png")), "detect été", "")


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_a_line_ends_with_a_line_break_alone(write, folder, odd):
    """Others may stand inside a JSON string, as they are; a byte order mark is passed over."""
    texts = {"prefix": f"caption{odd}en", "suffix": f"a{odd}star"}
    line = json.dumps(LINE | texts, ensure_ascii=False).replace(json.dumps(odd)[1:-1], odd)
    file = write("\ufeff" + line + "\r", line)
    assert open_list(file) == 2 * [Example((str(folder / "0.png"),), *texts.values())]


def test_prefixes_may_have_placeholders(write):
    """As they stand in files for other processors: the examples, and so the batches, are the same."""
    two = {**LINE, "image": ["1.png", "2.png"]}
    prefixes = ["<image>caption en", "<image> caption en\n", "<image><bos>caption en", "caption en\\n"]
    assert open_list(write(*({**LINE, "prefix": prefix} for prefix in prefixes))) == 4 * open_list(write(LINE))
    assert open_list(write({**two, "prefix": "<image><image>caption en"})) == open_list(write(two))
    with pytest.raises(DataError, match=r"line 2: a prompt begins with 2 <image> and has 1 image"):
        open_list(write(LINE, {**LINE, "prefix": "<image><image>caption en"}))


def test_pictures_may_lie_elsewhere(write, tmp_path_factory, folder):
    file = tmp_path_factory.mktemp("elsewhere") / "data.jsonl"
    file.write_text(json.dumps(LINE))
    assert open_list(file, image_root=folder) == open_list(write(LINE))
    with pytest.raises(DataError, match=r"line 1 names .*0\.png, which is missing: set image_root"):
        open_list(file)


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{oops", "line 2 is not JSON"),
        ("[1]", "line 2 holds a JSON list instead of an object"),
        ({**LINE, "image": "9.png"}, r"line 2 names .*9.png, which is missing"),
        ({**LINE, "image": "."}, r"line 2 names .*, which is a folder: name a picture"),
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
        open_list(write(LINE, bad, LINE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\n\n", b"\xff\xfe{}", None])
def test_a_bad_file_is_named(tmp_path, content):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl (is empty|is not there|cannot be read)") as caught:
        open_list(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "texts, message",
    [
        (("detect cat", "<loc1024><loc0000><loc0000><loc0000> cat"), "line 1 has '<loc1024>', which is no token"),
        (("detect cat", "<loc12><loc0000><loc0000><loc0000> cat"), "line 1 has '<loc12>', which is no token"),
        (("caption <seg128>", "a cat"), "line 1 has '<seg128>', which is no token"),
        (
            ("segment cat", "[[12, 30, 40, 30, 40, 60]] cat"),
            "0 locations and 0 mask codes: .* polygons",
        ),
        (("segment cat", "<loc0001>" * 6 + " cat"), "6 locations and 0 mask codes"),
        (("segment cat", "<loc0001>" * 4 + " cat"), "4 locations and 0 mask codes: a mask is 4 <loc....> and 16"),
        (("segment cat", "<loc0001>" * 4 + "<seg001>" * 15 + " cat"), "4 locations and 15 mask codes"),
    ],
)
def test_what_no_model_can_write_is_refused(opened, texts, message):
    with pytest.raises(DataError, match=message):
        opened({"image": "0.png", "prefix": texts[0], "suffix": texts[1]})


def test_masks_as_codes_are_taken(opened):
    suffix = "<loc0001>" * 4 + "<seg001>" * 16 + " cat"
    rows = [{"image": "0.png", "prefix": prefix, "suffix": suffix} for prefix in ("segment cat", "the cat")]
    assert [example.suffix for example in opened(*rows)] == [suffix] * 2


def test_a_slice_and_the_last_example(opened):
    examples = opened(LINE, LINE | {"suffix": "two"}, LINE | {"suffix": "three"})
    assert [example.suffix for example in examples[1:]] == ["two", "three"]
    assert examples[-1].suffix == "three"
    with pytest.raises(IndexError, match="example 3 of 3"):
        examples[3]


def test_segment_is_for_data_sets_with_outlines(write):
    with pytest.raises(ConfigError, match="data_task=segment is for data sets with outlines"):
        open_data(write(LINE), task="segment")
    with pytest.raises(ConfigError, match="data_task='mask' is not possible: give auto, detect, segment"):
        open_data(write(LINE), task="mask")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_a_file_that_is_cut_short_meanwhile_is_an_error(folder, name):
    path = folder / name
    path.write_text(json.dumps(LINE) if name == "x.jsonl" else "image,prefix,suffix\n0.png,caption en,a star")
    examples = open_data(path)
    assert examples[0].suffix == "a star"
    path.write_text(path.read_text()[:30])
    with pytest.raises(DataError, match="has become shorter since it was opened: start again"):
        examples[0]
