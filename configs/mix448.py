"""Ready for use, 448 px, for small things and text; PaliGemma 2 as in mix224."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config(family: str = "paligemma-3b") -> ConfigDict:
    return base.released(family, "mix-448")
