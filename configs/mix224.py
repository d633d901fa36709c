"""Ready for use, 224 px; PaliGemma 2 as configs/mix224.py:paligemma2-3b, -10b or -28b."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config(family: str = "paligemma-3b") -> ConfigDict:
    return base.released(family, "mix-224")
