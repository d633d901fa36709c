"""The shipped model: it knows coloured shapes, and needs no download."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"
    return config
