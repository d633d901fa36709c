"""The simple page: a picture, a prompt, settings, and the answer."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from paligemma_jax.serving.web import asking, parts
from paligemma_jax.serving.web.answering import Visits
from paligemma_jax.serving.web.backend import Backend


def make(backend: Backend, example: str, most_tokens: int, seed: int = 0) -> gr.Blocks:
    """The page.

    Args:
      example: path of the example picture.
      most_tokens: of an answer.
      seed: that the field of that name holds at first.
    """
    visits = Visits()
    with gr.Blocks(title="PaliGemma", analytics_enabled=False, delete_cache=parts.DELETE_CACHE) as page:
        status = parts.header("Ask a picture", backend)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                picture = parts.picture_input()
                with gr.Row(elem_id="examples"):
                    show = gr.Button("Example picture", size="sm", elem_id="example")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    settings = parts.settings_inputs(most_tokens, seed)
            with gr.Column(min_width=300):
                prompt = gr.Textbox(
                    "caption en",
                    label="Prompt",
                    info="caption en · answer en QUESTION · detect THING ; THING · segment THING · ocr",
                    elem_id="prompt",
                )
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask", scale=3, min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, scale=1, min_width=90)
                outputs = parts.answer_outputs()
        last = gr.State(None, time_to_live=parts.KEPT_S)

        async def answer(
            request: gr.Request, path: str | None, prompt: str, opacity: float, *values: Any
        ) -> AsyncIterator[dict[Any, Any]]:
            asked = example, path, "free", ("", "", "", prompt), values
            visitor = request.session_hash
            async for updates, question, shown, served in asking.answer(
                backend, visits, visitor, outputs, stop, opacity, asked
            ):
                if shown is not None and shown.ended and served is not None:
                    updates[last] = asking.remember(question, shown, served)
                yield updates

        inputs = [picture, prompt, outputs.opacity, *settings]
        for event in (ask.click, prompt.submit):
            event(answer, inputs, [*outputs.all(), stop, last], **parts.HIDDEN)
        show.click(lambda: example, None, picture, queue=False, **parts.HIDDEN)
        outputs.opacity.change(asking.redraw, [last, outputs.opacity], outputs.picture, **parts.HIDDEN)
        asking.wire_stop(stop, visits)
        asking.wire_status(status, backend)
        asking.wire_end(page, visits)
    return page.queue(default_concurrency_limit=None, api_open=False)
