"""Heat maps of phrases over the picture, by a patch ViT beside the model that answers."""

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from paligemma_jax.errors import PromptError, UserError, shortened
from paligemma_jax.patch_vit import Clip, Student
from paligemma_jax.patch_vit.view import heatmap_view
from paligemma_jax.serving.web.markup import notes_markup
from paligemma_jax.serving.web.parts import HIDDEN
from paligemma_jax.serving.web.questions import read_picture
from paligemma_jax.tasks.prompts import split_labels

Pair = tuple[Student, Clip]

_HELP = "Where each phrase is, as a small patch-embedding ViT sees it: the brighter, the more alike."


def phrases_tab(picture: gr.Image, load_pair: Callable[[], Pair]) -> None:
    """The contents of the tab.

    Args:
      picture: of the page.
      load_pair: the models, read when first asked for.
    """
    gr.HTML(f'<p class="pj-empty">{_HELP}</p>')
    with gr.Row(equal_height=True):
        phrases = gr.Textbox(label="Phrases", placeholder="purple circle ; star", elem_id="phrases")
        show = gr.Button("Show where", elem_id="show_phrases", scale=0, min_width=140)
    remark = gr.HTML(elem_id="phrases_remark")
    gallery = gr.Gallery(
        label="Heat maps",
        show_label=False,
        elem_id="phrase_maps",
        visible=False,
        columns=2,
        object_fit="contain",
        height="auto",
        buttons=["fullscreen"],
    )

    def draw(path: str | None, text: str) -> tuple[Any, Any]:
        try:
            return "", gr.update(value=heat_maps(load_pair, path, text), visible=True)
        except UserError as error:
            return notes_markup([shortened(" ".join(str(error).split()))], "error"), gr.update(visible=False)

    # One at a time, as it runs beside the engine.
    event = {"concurrency_limit": 1, "show_progress_on": [gallery]} | HIDDEN
    for trigger in (show.click, phrases.submit):
        trigger(draw, [picture, phrases], [remark, gallery], **event)


def heat_maps(load_pair: Callable[[], Pair], path: str | None, text: str) -> list[tuple[Image.Image, str]]:
    """Pictures with the phrases that they show; UserError when something is missing."""
    image = read_picture(path)
    if not (names := split_labels(text or "")):
        raise PromptError('there are no phrases: name some, with " ; " between them')
    student, clip = load_pair()
    overlays, _ = heatmap_view(student, clip, image, names)
    return list(zip(overlays, names, strict=True))
