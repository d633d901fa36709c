"""From a click to an answer on the page: the events that both pages have."""

import tempfile
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import gradio as gr

from paligemma_jax.errors import UserError, shortened
from paligemma_jax.serving.web import answering, files, parts
from paligemma_jax.serving.web.answering import Shown, Visits
from paligemma_jax.serving.web.backend import Backend, Served
from paligemma_jax.serving.web.markup import notes_markup, table_markup
from paligemma_jax.serving.web.parts import Last, Outputs
from paligemma_jax.serving.web.questions import Question, name_of, options_of, prompt_of, read_picture

Updates = dict[Any, Any]


def read_question(
    example: str, path: str | None, task: str, inputs: tuple[str, str, str, str], settings: tuple[Any, ...]
) -> Question:
    """What the fields of the page ask.

    Args:
      example: path of the example picture.
      inputs, settings: arguments of `questions.prompt_of` behind the task, and of `questions.options_of`.

    Raises:
      ImageError, PromptError, SamplingError: what is to be mended.
    """
    picture = read_picture(path)
    return Question(picture, name_of(path, example), prompt_of(task, *inputs), options_of(*settings))


async def answer(
    backend: Backend,
    visits: Visits,
    visitor: str,
    outputs: Outputs,
    stop: gr.Button,
    opacity: float,
    asked: tuple[Any, ...],
) -> AsyncIterator[tuple[Updates, Question | None, Shown | None, Served | None]]:
    """Updates of the page while an answer comes, with the question, what is shown of it, and who gives it.

    asked: arguments of `read_question`.
    """
    cleared = {outputs.picture: gr.skip(), outputs.table: "", outputs.opacity: gr.update(visible=False)}
    try:
        question = await anyio.to_thread.run_sync(read_question, *asked)
    except UserError as error:
        line = notes_markup([shortened(" ".join(str(error).split()))], "error")
        hidden = {outputs.picture: gr.update(visible=False, value=None)}
        yield {outputs.answer: line, stop: gr.update(interactive=False)} | cleared | hidden, None, None, None
        return
    drawn = 0  # objects on the picture that is shown
    first = True
    async for shown, served in answering.answer(backend, visits, visitor, question):
        updates: Updates = {outputs.answer: parts.shown_answer(shown)}
        if first:
            updates |= cleared | {
                outputs.picture: gr.update(visible=False, value=None),
                stop: gr.update(interactive=True),
            }
            first = False
        if len(shown.objects) > drawn or (shown.finished and shown.objects):
            drawn = len(shown.objects)
            image = await anyio.to_thread.run_sync(parts.drawn, shown, opacity)
            updates[outputs.picture] = gr.update(visible=True, value=image)
        if shown.ended:
            has_masks = any(item.mask is not None for item in shown.objects)
            updates |= {
                outputs.table: table_markup(shown.objects),
                outputs.opacity: gr.update(visible=has_masks),
                stop: gr.update(interactive=False),
            }
        yield updates, question, shown, served


async def with_files(
    question: Question, shown: Shown, served: Served, opacity: float, buttons: tuple[Any, Any, Any]
) -> AsyncIterator[Updates]:
    """The update of the download buttons; the files are copied by Gradio while this waits, and gone afterwards."""

    def write(directory: Path) -> files.Files:
        objects, dropped = answering.at_full_size(shown.finished, served, question)
        return files.write_files(directory, question, shown.finished.output, objects, dropped, opacity)

    with tempfile.TemporaryDirectory() as directory:
        written = await anyio.to_thread.run_sync(write, Path(directory))
        for line in written.notes:
            gr.Info(line)
        paths = written.json, written.coco, written.png
        updates: Updates = {
            button: gr.update(visible=path is not None, value=None if path is None else str(path))
            for button, path in zip(buttons, paths, strict=True)
        }
        yield updates


def redraw(last: Last | None, opacity: float) -> Any:
    """The picture of the answer that is seen, with masks of another opacity."""
    return gr.skip() if last is None else gr.update(value=parts.drawn(last.shown, opacity))


def remember(question: Question, shown: Shown, served: Served) -> Last:
    return Last(question, shown, weakref.ref(served))


def wire_stop(stop: gr.Button, visits: Visits) -> None:
    """Have a button end the answers of who presses it."""

    def pressed(request: gr.Request) -> None:
        visits.stop(request.session_hash)

    stop.click(pressed, None, None, queue=False, **parts.HIDDEN)


def wire_status(place: gr.HTML, backend: Backend) -> None:
    """Keep the line about the model true."""
    gr.Timer(1.0).tick(lambda: parts.status_markup(backend.status()), None, place, queue=False, **parts.HIDDEN)


def wire_end(page: gr.Blocks, visits: Visits) -> None:
    """Cancel the answers of who leaves."""

    def left(request: gr.Request) -> None:
        visits.stop(request.session_hash)

    page.unload(left)
