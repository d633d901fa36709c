"""A run config to a model that is ready."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError
from paligemma_jax.runs.settings import one_of

_HOW_TO_GET = """there are no weights in {path} yet. To get them:
  1. accept the licence at https://huggingface.co/{hub_id}
  2. pip install huggingface_hub && hf auth login
  3. add --config.checkpoint={hub_id} to the command: they are downloaded once
A directory that has them already: --config.checkpoint=DIR
Meanwhile, the small model that is shipped: python main.py --config=configs/tiny.py"""


def load(config: ConfigDict, warm_up: Sequence[pj.Request] = (), batch_size: int = 1) -> pj.PaliGemma:
    """The model of a generate, chat or evaluate run; see `pj.load` for `warm_up`; `batch_size` prompts run at once.

    Raises:
      UserError: see the message; nothing is fetched from the hub unless `checkpoint` names it.
    """
    quantization = one_of(config, "quantization", ("none", "int8", "int4"))
    resample = one_of(config, "resample", ("auto", "bicubic", "bilinear"))
    check_weights(config)
    model = pj.load(
        config.checkpoint,
        dtype=dtype(config),
        quantization=None if quantization == "none" else quantization,
        mask_vae=config.mask_vae or None,
        batch_size=batch_size * config.get("num_beams", 1),
        warm_up=warm_up,
        adapter=config.adapter or None,
        compilation_cache=config.compilation_cache,
        mesh=config.get("mesh") or None,
    )
    if resample != "auto":
        settings = dataclasses.replace(model.processor.image_settings, resample=resample)
        model.processor = dataclasses.replace(model.processor, image_settings=settings)
    return model


def dtype(config: ConfigDict) -> str:
    """The format of weights and activations."""
    return one_of(config, "dtype", ("bfloat16", "float16", "float32"))


def check_weights(config: ConfigDict) -> None:
    """Say how to get the weights of a published model when the place that its config names is empty."""
    if not config.checkpoint:
        raise CheckpointError("no checkpoint is given: name a directory or a hub id with --config.checkpoint=...")
    path = Path(config.checkpoint)
    is_default = config.hub_id and path == Path("checkpoints", config.hub_id.split("/")[-1])
    if is_default and not path.exists():
        raise CheckpointError(_HOW_TO_GET.format(path=path, hub_id=config.hub_id))
