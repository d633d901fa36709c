"""A look inside the last answer: the maps of `inspection`."""

from typing import Any

import gradio as gr

from paligemma_jax.errors import ConfigError, UserError, shortened
from paligemma_jax.inspection.figures import figures
from paligemma_jax.inspection.findings import inspect_answer
from paligemma_jax.serving.web.markup import notes_markup
from paligemma_jax.serving.web.parts import Last

_KINDS = ("similarity", "attention", "lens")
_HELP = "What the model looked at for the answer above: attention, similarity to a word, and what each layer would say."


def inside_tab(last: gr.State) -> None:
    """The contents of the tab."""
    gr.HTML(f'<p class="pj-empty">{_HELP}</p>')
    with gr.Row(equal_height=True):
        word = gr.Textbox(label="Compare patches with", placeholder="a word, such as: star", elem_id="inside_word")
        show = gr.Button("Look inside", elem_id="look", scale=0, min_width=140)
    remark = gr.HTML(elem_id="inside_remark")
    gallery = gr.Gallery(
        label="Maps",
        show_label=False,
        elem_id="maps",
        visible=False,
        columns=2,
        object_fit="contain",
        height="auto",
        buttons=["fullscreen"],
    )

    def look(last: Last | None, word: str) -> tuple[Any, Any]:
        try:
            return "", gr.update(value=maps_of(last, word), visible=True)
        except UserError as error:
            return notes_markup([shortened(" ".join(str(error).split()))], "error"), gr.update(visible=False)

    # One at a time: it runs beside the engine, and takes memory of its own.
    event = {"concurrency_limit": 1, "api_visibility": "private", "show_progress_on": [gallery]}
    show.click(look, [last, word], [remark, gallery], **event)


def maps_of(last: Last | None, word: str) -> list[tuple[Any, str]]:
    """Pictures with titles; UserError when there is no answer, or its model is not here."""
    if last is None or not last.shown.ended or last.shown.error:
        raise ConfigError("there is no answer to look into: ask something first")
    served = last.served()
    if served is None:
        raise ConfigError("another model has taken the place of the one that answered: ask again")
    if served.model is None:
        raise ConfigError("the model is on another server, and looking inside needs it here: start without server=...")
    prompt = last.question.prompt
    words = (word or "").strip() or (prompt.labels[0] if prompt.labels else "")
    kinds = [kind for kind in _KINDS if kind != "similarity" or words]

    findings = inspect_answer(served.model, last.shown.picture, prompt.text, last.shown.text, words, kinds)
    return [(figure.image, figure.title) for figure in figures(findings) if figure.name not in ("norms", "embeddings")]
