"""To be fine-tuned, 448 px; PaliGemma 2 as in pt224."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config(family: str = "paligemma-3b") -> ConfigDict:
    return base.released(family, "pt-448")
