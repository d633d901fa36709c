"""Answers about one picture with another one's embeddings: swapped whole or in part, mixed, and rounded."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.run = "swap"
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"
    config.image = base.shipped("examples/shapes.png")  # A: path or URL
    config.other_image = base.shipped("examples/stars.png")  # B
    config.max_new_tokens = 40
    config.output_dir = "output/swap"  # folder for a.npy and b.npy
    config.box = ""  # also swap only the patches in x0,y0,x1,y1, fractions of the picture: 0,0,0.5,1 is its left half
    config.mix = "0.75,0.5,0.25"  # fractions of A in mixtures with B
    config.bits = "16,8,4,2"  # to which A's embeddings are rounded, one after the other
    return config
