"""The parts of which the full and the simple page are made: Gradio components, and what fills them."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.serving.web.answering import Shown
from paligemma_jax.serving.web.backend import Backend, Served, Status
from paligemma_jax.serving.web.markup import answer_markup, escape, notes_markup, numbers_markup
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.tasks.draw import MASK_OPACITY, draw

HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}  # of all events: programs have an API of their own
KEPT_S = 3600  # that a visitor's last answer is kept
DELETE_CACHE = (600, 3600)  # seconds between two looks for old files, and their age
_STATES = {
    "loading": "is being loaded",
    "warming": "is being made ready",
    "ready": "is ready",
    "failed": "does not answer",
}
EMPTY = '<p class="pj-empty">The answer appears here, word by word.</p>'


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where an answer is shown."""

    answer: gr.HTML
    picture: gr.Image
    table: gr.HTML
    opacity: gr.Slider

    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Last:
    """The answer that a visitor sees, for what is done with it later.

    served: who gave it, as long as that one answers.
    """

    question: Question
    shown: Shown
    served: "weakref.ref[Served]"


def header(subtitle: str, backend: Backend) -> gr.HTML:
    """The title, and beside it the place for the line about the model, which is returned."""
    with gr.Row(elem_id="top"):
        gr.HTML(f'<div id="header"><h1>PaliGemma</h1><p>{escape(subtitle)}</p></div>')
        return gr.HTML(status_markup(backend.status()), elem_id="status")


def picture_input() -> gr.Image:
    """A picture by upload, camera or paste; its file is handed on as it came, to be checked by the project's rules."""
    picture = gr.Image(
        type="filepath",
        sources=["upload", "webcam", "clipboard"],
        label="Picture",
        show_label=False,
        height=320,
        elem_id="picture",
        buttons=[],
        placeholder="Drop a picture here, or click to choose one",
    )
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def settings_inputs(most_tokens: int, seed: int) -> list[Any]:
    """The fields of `questions.options_of`, in its order."""
    plain = GenerateOptions()
    usual = min(plain.max_new_tokens, most_tokens)
    return [
        gr.Slider(1, most_tokens, usual, step=1, label="Longest answer", elem_id="max_new_tokens",
                  info="In tokens. A word takes one or two, a box about 6, a mask 16 more."),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", elem_id="temperature",
                  info="0 always takes the likeliest token; higher is more varied."),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", elem_id="top_p",
                  info="Draw among the fewest tokens that hold this probability together; 1 means all."),
        gr.Slider(0, 100, 0, step=1, label="Top-k", elem_id="top_k",
                  info="Draw among this many of the likeliest tokens; 0 means all."),
        gr.Slider(0, 1, 0, step=0.01, label="Min-p", elem_id="min_p",
                  info="Draw among tokens at least this much as probable as the likeliest; 0 means all."),
        gr.Number(seed, precision=0, minimum=0, label="Seed", elem_id="seed",
                  info="The same seed gives the same answer. It matters when the temperature is above 0."),
        gr.Checkbox(False, label="Only objects", elem_id="constrain",
                    info="Answers to Detect and Segment can be nothing but objects of the names asked for."),
    ]  # fmt: skip


def answer_outputs() -> Outputs:
    """The answer, and below it the picture with its objects, when there are any."""
    answer = gr.HTML(EMPTY, elem_id="answer")
    picture = gr.Image(
        label="What was found",
        show_label=False,
        elem_id="drawn",
        interactive=False,
        visible=False,
        buttons=["fullscreen"],
    )
    opacity = gr.Slider(0, 1, MASK_OPACITY, step=0.05, label="Opacity of masks", elem_id="opacity", visible=False)
    table = gr.HTML(elem_id="objects")
    return Outputs(answer, picture, table, opacity)


def shown_answer(shown: Shown) -> str:
    """The answer card."""
    body = answer_markup(shown.text, shown.objects)
    if shown.ended:
        body = f'<div class="pj-answer" aria-live="polite">{body}</div>' if shown.text.strip() else ""
        if shown.stopped:
            body += notes_markup(["stopped"])
        if shown.error:
            body += notes_markup([shown.error], "error")
        if shown.finished is not None:
            body += numbers_markup(shown.finished)
        return f'<div data-answer="{shown.number}">{body}{notes_markup(shown.notes)}</div>'
    if shown.waiting:
        return '<p class="pj-empty pj-answer pj-growing">Waiting for the model</p>'
    return f'<div class="pj-answer pj-growing">{body}</div>'


def drawn(shown: Shown, opacity: float) -> Image.Image:
    """The picture with the objects so far."""
    return draw(shown.picture, shown.objects, opacity)


def status_markup(status: Status) -> str:
    """One line: a dot, the model, how it is, and the news."""
    news = f'<span class="{"pj-error" if status.is_error else ""}">{escape(status.news)}</span>' if status.news else ""
    name = escape(Path(status.name).name if status.state != "failed" and Path(status.name).exists() else status.name)
    state = f"<span>{_STATES[status.state]}</span>"
    return f'<div class="pj-status pj-{status.state}" role="status"><i></i><b>{name}</b>{state}{news}</div>'
