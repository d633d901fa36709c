"""What a visitor asks: tasks of the page to prompts, settings to options, an uploaded file to a picture."""

import dataclasses
import math
import re
from pathlib import Path

from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import ImageError, PromptError, SamplingError
from paligemma_jax.serving.uploads import MAX_PIXELS, read_upload
from paligemma_jax.tasks.prompts import Prompt, class_prompts, read_prompt

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "ru", "ar", "hi", "id", "ja", "ko", "th", "vi", "zh")
_BETWEEN = re.compile(r"[,;\n]")


@dataclasses.dataclass(frozen=True)
class PageTask:
    """A button of the page.

    title: what stands on it.
    inputs: which of language, question, things and prompt it needs.
    """

    title: str
    inputs: tuple[str, ...] = ()


TASKS = {
    "caption": PageTask("Caption", ("language",)),
    "question": PageTask("Question", ("language", "question")),
    "detect": PageTask("Detect", ("things",)),
    "segment": PageTask("Segment", ("things",)),
    "ocr": PageTask("Read text"),
    "free": PageTask("Prompt", ("prompt",)),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt about a picture.

    picture: upright, RGB.
    name: what its file is called.
    """

    picture: Image.Image
    name: str
    prompt: Prompt
    options: pj.GenerateOptions


def prompt_of(task: str, language: str = "en", question: str = "", things: str = "", prompt: str = "") -> Prompt:
    """The prompt of a task of the page; PromptError when what it needs is empty."""
    language, question, prompt = (language or "en").strip(), " ".join((question or "").split()), (prompt or "").strip()
    match task:
        case "caption":
            return read_prompt(f"caption {language}")
        case "question":
            if not question:
                raise PromptError("there is no question: type one, such as: how many stars are there?")
            return read_prompt(f"answer {language} {question}")
        case "detect" | "segment":
            names = [name for part in _BETWEEN.split(things or "") if (name := part.strip())]
            if not names:
                raise PromptError("nothing to look for is named: type names, such as: circle ; star")
            [found] = class_prompts(task, names)
            return found
        case "ocr":
            return read_prompt("ocr")
        case "free":
            if not prompt:
                raise PromptError("there is no prompt: type one, such as: caption en")
            return read_prompt(prompt, num_images=1)
    raise PromptError(f"there is no task {task!r:.40}: choose one of the buttons")


def options_of(
    max_new_tokens: float | None = 100,
    temperature: float | None = 0.0,
    top_p: float | None = 1.0,
    top_k: float | None = 0,
    min_p: float | None = 0.0,
    seed: float | None = 0,
    constrain: bool = False,
) -> pj.GenerateOptions:
    """Options out of the fields of the page, which may be empty; SamplingError for values without meaning."""
    whole = {name: _whole(name, value) for name, value in (("top_k", top_k), ("seed", seed))}
    real = {name: _real(name, value) for name, value in (("temperature", temperature), ("top_p", top_p))}
    sampling = pj.Sampling(**whole, **real, min_p=_real("min_p", min_p))
    return pj.GenerateOptions(_whole("max_new_tokens", max_new_tokens), sampling, bool(constrain))


def read_picture(path: str | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in an uploaded file; ImageError when there is none or it is not accepted, see `read_upload`."""
    if not path:
        raise ImageError("there is no picture: upload, paste or take one, or choose an example")
    try:
        content = Path(path).read_bytes()
    except OSError:  # it was deleted, as uploads are after an hour
        raise ImageError("the picture is no longer there: choose it again") from None
    return read_upload(content, max_pixels)


def name_of(path: str, example: str = "") -> str:
    """What an uploaded file is called where the visitor has it; the example by its own path."""
    file = Path(path)
    if example and file.name == Path(example).name and file.read_bytes() == Path(example).read_bytes():
        return example
    return file.name


def _real(name: str, value: float | None) -> float:
    if value is None or isinstance(value, str) or not math.isfinite(value):
        raise SamplingError(f"{name} is empty or no number: type one")
    return value


def _whole(name: str, value: float | None) -> int:
    if (number := _real(name, value)) != int(number):
        raise SamplingError(f"{name}={value} is not possible: give an integer")
    return int(number)
