"""The full page: model, picture, a button per task, the answer with what can be done with it, and a look inside."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from paligemma_jax.serving.web import asking, history, parts, snippets
from paligemma_jax.serving.web.answering import Visits
from paligemma_jax.serving.web.backend import Backend
from paligemma_jax.serving.web.inside import inside_tab
from paligemma_jax.serving.web.models import model_tab
from paligemma_jax.serving.web.phrases import Pair, phrases_tab
from paligemma_jax.serving.web.questions import LANGUAGES, TASKS, Question
from paligemma_jax.serving.web.snippets import Source

_NO_CALLS = '<p class="pj-empty">Ask something: the calls that give the same answer appear here.</p>'
_EXAMPLES = {  # what stands on a button: task, question, things, prompt
    "Describe it": ("caption", "", ""),
    "Count the stars": ("question", "how many stars are there?", ""),
    "Find shapes": ("detect", "", "circle ; star"),
    "Cut out the star": ("segment", "", "star"),
}


def make(
    backend: Backend, example: str, most_tokens: int, seed: int = 0, load_pair: Callable[[], Pair] | None = None
) -> gr.Blocks:
    """The page; `load_pair` reads a patch ViT and its teacher, others as of `simple.make`."""
    visits = Visits()
    with gr.Blocks(title="PaliGemma", analytics_enabled=False, delete_cache=parts.DELETE_CACHE) as page:
        status = parts.header("Ask a picture: text, boxes and masks", backend)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                picture = parts.picture_input()
                with gr.Row(elem_id="examples"):
                    examples = [gr.Button(name, size="sm", elem_classes="example") for name in _EXAMPLES]
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    settings = parts.settings_inputs(most_tokens, seed)
            with gr.Column(scale=6, min_width=300):
                task, fields = _task_inputs()
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask", scale=3, min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, scale=1, min_width=90)
                outputs = parts.answer_outputs()
                with gr.Row(elem_id="downloads"):
                    names = ("JSON", "COCO", "PNG")
                    downloads = tuple(
                        gr.DownloadButton(name, size="sm", visible=False, elem_id=f"download_{key}")
                        for name, key in zip(names, ("json", "coco", "png"), strict=True)
                    )
        last, visit = gr.State(None, time_to_live=parts.KEPT_S), gr.State((), time_to_live=parts.KEPT_S)
        with gr.Tabs(elem_id="more"):
            with gr.Tab("Code", elem_id="tab_calls"):
                calls = _calls()
            with gr.Tab("Look inside", elem_id="tab_inside"):
                inside_tab(last)
            if load_pair is not None:
                with gr.Tab("Phrases", elem_id="tab_phrases"):
                    phrases_tab(picture, load_pair)
            with gr.Tab("History", elem_id="tab_history"):
                past = gr.HTML(history.history_markup(()), elem_id="history")
            with gr.Tab("Model", elem_id="tab_model"):
                model_tab(backend)

        async def answer(
            request: gr.Request, path: str | None, task: str, opacity: float, entries: tuple, *values: Any
        ) -> AsyncIterator[dict[Any, Any]]:
            asked = example, path, task, values[: len(fields)], values[len(fields) :]
            visitor = request.session_hash
            hidden = dict.fromkeys(downloads, gr.update(visible=False))
            async for updates, *now in asking.answer(backend, visits, visitor, outputs, stop, opacity, asked):
                yield updates | hidden
                hidden, end = {}, now
            question, shown, served = end
            if shown is None or served is None:
                return
            written = {last: asking.remember(question, shown, served)} | _snippets(calls, served.source, question)
            entries = history.add(entries, shown.picture, question.prompt.text, parts.shown_answer(shown))
            yield written | {visit: entries, past: history.history_markup(entries)}
            if shown.finished is not None:
                async for updates in asking.with_files(question, shown, served, opacity, downloads):
                    yield updates

        inputs = [picture, task, outputs.opacity, visit, *fields, *settings]
        places = [*outputs.all(), stop, *downloads, last, visit, past, *calls]
        asked = {"fn": answer, "inputs": inputs, "outputs": places} | parts.HIDDEN
        for event in (ask.click, *(field.submit for field in fields[1:])):
            event(**asked)
        for button, values in zip(examples, _EXAMPLES.values(), strict=True):
            _wire_example(button, example, values, [picture, task, *fields], asked)
        outputs.opacity.change(asking.redraw, [last, outputs.opacity], outputs.picture, **parts.HIDDEN)
        asking.wire_stop(stop, visits)
        asking.wire_status(status, backend)
        asking.wire_end(page, visits)
    return page.queue(default_concurrency_limit=None, api_open=False)


def _task_inputs() -> tuple[gr.Radio, list[Any]]:
    """The buttons of tasks, and the fields in the order of `questions.prompt_of`; those a task needs are seen."""
    choices = [(task.title, name) for name, task in TASKS.items()]
    task = gr.Radio(choices, value="caption", label="Task", show_label=False, container=False, elem_id="task")
    fields = {
        "language": gr.Dropdown(LANGUAGES, value="en", label="Language", elem_id="language", allow_custom_value=True),
        "question": gr.Textbox(label="Question", placeholder="how many stars are there?", elem_id="question"),
        "things": gr.Textbox(label="Things to find", placeholder="circle ; star", elem_id="things"),
        "prompt": gr.Textbox(label="Prompt", placeholder="caption en", elem_id="prompt"),
    }
    for name, field in fields.items():
        field.visible = name in TASKS["caption"].inputs

    def choose(chosen: str) -> list[Any]:
        return [gr.update(visible=name in TASKS[chosen].inputs) for name in fields]

    task.change(choose, task, list(fields.values()), queue=False, **parts.HIDDEN)
    return task, list(fields.values())


def _calls() -> list[Any]:
    """The place for a remark, and for each call."""
    return [
        gr.HTML(_NO_CALLS, elem_id="no_calls"),
        *(
            gr.Textbox(label=name, elem_id=f"call_{key}", elem_classes="call", visible=False, interactive=False,
                       max_lines=20, buttons=["copy"])
            for key, name in (("command", "Command line"), ("python", "Python"), ("curl", "curl"))
        ),
    ]  # fmt: skip


def _snippets(calls: Sequence[Any], source: Source, question: Question) -> dict[Any, Any]:
    remark, *places = calls
    texts = (make(source, question) for make in (snippets.command, snippets.python, snippets.curl))
    shown = (gr.update(value=text, visible=True) for text in texts)
    return {remark: gr.update(visible=False)} | dict(zip(places, shown, strict=True))


def _wire_example(
    button: gr.Button, example: str, values: tuple[str, str, str], places: list[Any], asked: dict
) -> None:
    """Have a button fill in the fields, and ask."""
    task, question, things = values

    def fill() -> list[Any]:
        texts = {"language": "en", "question": question, "things": things, "prompt": ""}
        return [example, task, *(gr.update(value=v, visible=n in TASKS[task].inputs) for n, v in texts.items())]

    button.click(fill, None, places, queue=False, **parts.HIDDEN).then(**asked)
