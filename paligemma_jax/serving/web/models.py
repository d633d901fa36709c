"""Choosing another model."""

import dataclasses
from typing import Any

import gradio as gr

from paligemma_jax.errors import UserError, shortened
from paligemma_jax.serving.web import parts
from paligemma_jax.serving.web.backend import Backend
from paligemma_jax.serving.web.markup import notes_markup
from paligemma_jax.serving.web.snippets import Source

_HUB = ("google/paligemma-3b-mix-224", "google/paligemma-3b-mix-448", "google/paligemma2-3b-mix-224")
_REMOTE = "This page asks a server: its model is the one that answers."
_FIXED = "Models cannot be chosen here, because other machines can reach this page."


def model_tab(backend: Backend) -> None:
    """The contents of the tab."""
    if not backend.can_load:
        gr.HTML(f'<p class="pj-empty">{_REMOTE if backend.status().name.startswith("http") else _FIXED}</p>')
        return
    known = [backend.status().name, *_HUB]
    with gr.Row(equal_height=True):
        path = gr.Dropdown(
            known, value=known[0], label="Model", allow_custom_value=True, elem_id="model_path", scale=3,
            info="A directory, an .npz file, or a hub id, which is downloaded once (licence and token needed).",
        )  # fmt: skip
        dtype = gr.Dropdown(["float32", "bfloat16", "float16"], value="float32", label="Number format", elem_id="dtype",
                            info="bfloat16 for released models.")  # fmt: skip
        rounding = gr.Dropdown(["none", "int8", "int4"], value="none", label="Rounding", elem_id="quantization",
                               info="Less memory, a little less exact.")  # fmt: skip
    load = gr.Button("Load", elem_id="load", size="md")
    remark = gr.HTML(elem_id="model_remark")

    def start(path: str | None, dtype: str, rounding: str) -> Any:
        try:
            name, served = (path or "").strip(), backend.served()
            before = Source("") if served is None else served.source
            adapter = before.adapter if name == before.checkpoint else ""  # it belongs to that model
            chosen = dataclasses.replace(before, checkpoint=name, dtype=dtype, quantization=rounding, adapter=adapter)
            backend.load(chosen)
        except UserError as error:
            return notes_markup([shortened(" ".join(str(error).split()))], "error")
        return notes_markup(["Loading. The model before answers until this one is ready; the line on top tells."])

    load.click(start, [path, dtype, rounding], remark, queue=False, **parts.HIDDEN)
