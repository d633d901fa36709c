"""Look inside one answer: heat maps over the picture, words for its patches, and a report to explore."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.run = "inspect"
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"
    config.prompt = "detect blue star"
    config.output_dir = "output/inspect"  # folder for the maps: .png to look at, .npy to work with

    config.answer = ""  # answer to look into; empty: the model's own
    config.maps = "norms,similarity,attention,lens,embeddings"  # also occlusion, which is slow: a pass per square
    config.text = ""  # what patches are compared with; empty: what the prompt names after its first word
    config.layer = "mean"  # whose maps are shown, from 1; mean: of the upper half
    config.head = "mean"  # whose attention is shown, from 1; mean: of all
    config.words = 5  # how many tokens of the vocabulary are listed for each patch and layer
    config.occlusion_size = 0  # side of the hidden square in patches; 0: an eighth of the picture's
    config.occlusion_way = "pixels"  # what is hidden: pixels, or tokens, which is faster and says less
    config.report = False  # also write report.html, to explore in a browser
    config.embeddings_file = ""  # .npy of soft tokens; only their heat map is drawn, without any model
    return config
