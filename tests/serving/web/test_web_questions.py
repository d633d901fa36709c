"""What the fields of the page ask."""

import io

import pytest
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import ImageError, PromptError, SamplingError
from paligemma_jax.serving.uploads import read_upload
from paligemma_jax.serving.web.questions import TASKS, name_of, options_of, prompt_of, read_picture


@pytest.mark.parametrize(
    "task, fields, text",
    [
        ("caption", {"language": "de"}, "caption de"),
        ("caption", {"language": None}, "caption en"),
        ("question", {"question": " how  many? "}, "answer en how many?"),
        ("detect", {"things": "circle, star;circle"}, "detect circle ; star"),
        ("segment", {"things": "red star"}, "segment red star"),
        ("ocr", {}, "ocr"),
        ("free", {"prompt": "<image>detect cat"}, "<image>detect cat"),
    ],
)
def test_a_task_is_a_prompt(task, fields, text):
    assert task in TASKS
    assert prompt_of(task, **fields).text == text


def test_labels_are_those_that_are_named():
    assert prompt_of("detect", things="circle\nstar").labels == ("circle", "star")


@pytest.mark.parametrize(
    "task, fields, says",
    [
        ("question", {"question": "  "}, "no question"),
        ("detect", {"things": " ; , "}, "nothing to look for"),
        ("segment", {"things": None}, "nothing to look for"),
        ("free", {}, "no prompt"),
        ("free", {"prompt": "<image><image>x"}, "2 <image>"),
        ("dance", {}, "no task 'dance'"),
    ],
)
def test_what_is_missing_is_said(task, fields, says):
    with pytest.raises(PromptError, match=says):
        prompt_of(task, **fields)


def test_the_defaults_are_those_of_the_command_line():
    assert options_of() == pj.GenerateOptions()


def test_settings_become_options():
    options = options_of(7, 0.5, 0.9, 3.0, 0.1, 11, True)
    assert options == pj.GenerateOptions(7, pj.Sampling(0.5, 3, 0.9, 0.1, seed=11), True)


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed"])
@pytest.mark.parametrize("value", [None, float("nan"), "x", -1])
def test_settings_without_meaning_are_one_line(name, value):
    with pytest.raises(SamplingError, match=name) as error:
        options_of(**{name: value})
    assert "\n" not in str(error.value)


def test_half_a_token_is_refused():
    with pytest.raises(SamplingError, match="integer"):
        options_of(max_new_tokens=1.5)


def encoded(kind: str, size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format=kind)
    return file.getvalue()


def test_an_upload_is_read(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(encoded("PNG"))
    assert read_picture(str(path)).size == (4, 3)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%PDF-1.7 x", "PDF"),
        (b"%!PS-Adobe", "PostScript"),
        (encoded("PNG")[:50], "damaged or truncated"),
        (encoded("PNG", (1, 1)), "1 x 1"),
        (encoded("ICO", (16, 16)), "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(content, says, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=says) as error:
        read_picture(str(path))
    assert "\n" not in str(error.value)


def test_a_picture_with_too_many_pixels_is_not_decoded():
    with pytest.raises(ImageError, match="at most 11 pixels"):
        read_upload(encoded("PNG"), max_pixels=11)


@pytest.mark.parametrize("path", [None, "", "gone.png"])
def test_no_picture_is_said(path):
    with pytest.raises(ImageError, match=r"no picture|no longer there"):
        read_picture(path)


def test_the_example_is_called_by_its_path(tmp_path):
    example, copy, other = tmp_path / "a.png", tmp_path / "up" / "a.png", tmp_path / "down" / "a.png"
    for file, content in ((example, b"1"), (copy, b"1"), (other, b"2")):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    assert name_of(str(copy), str(example)) == str(example)
    assert name_of(str(other), str(example)) == "a.png"
