"""Builds the shipped model from a seed; stop it at any time, the same command goes on."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "make_tiny"
    config.work_dir = "output/make_tiny"  # scenes, checkpoints and stages that are done; about 4 GB
    config.start_from = ""  # a model that an earlier run made, to go on with; its tokenizer is kept
    config.output_dir = base.shipped("tiny")  # the finished model

    config.num_scenes = 60_000  # pictures drawn to train on
    config.wide_share = 0.0  # of them: shapes at any rotation on textures, leaves, clouds; 0 draws the calm world alone
    config.mask_vae = "keep"  # that of start_from: keep, or train it further, which shifts the meaning of codes
    config.mask_vae_steps = 800  # of the mask VQ-VAE
    config.mask_vae_learning_rate = 1e-3  # peak, after the warm-up
    config.vision_steps = 1_500  # of the image encoder alone
    config.language_steps = 5_500  # of the whole model
    config.easy_steps = 300  # curriculum: steps with one shape in a picture, then as many with up to two
    config.segment_every = 3  # one in so many batches of the last stage asks for masks
    config.vision_learning_rate = 1e-3  # peak, after the warm-up
    config.language_learning_rate = 1e-3  # peak, after the warm-up
    config.vision_factor = 0.25  # learning rate of the image encoder in the last stage, times this
    config.loc_sigma = 5.0  # width of the soft targets over locations, in 1/1024 of the picture
    config.dense_weight = 1.0  # of the dense loss on what each patch shows, beside the language loss
    return config
