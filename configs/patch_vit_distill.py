"""Distillation of a patch ViT from a CLIP, on your own pictures."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "patch_vit_distill"
    config.teacher = ""  # directory or hub id of a CLIP with an embedding of 512, such as openai/clip-vit-base-patch32
    config.train = ""  # folders of jpg, jpeg and png files to train on, with a semicolon between them; subfolders too
    config.val = ""  # folders to validate on after each epoch, at most 10,000 pictures
    config.extra = ""  # folders that are split: nine in ten pictures to train on, one to validate, by their content
    config.output_dir = "output/patch_vit"  # the student after each epoch, and the state to resume from
    config.cache = ""  # file of the teacher's embeddings; by default teacher.sqlite in output_dir
    config.start_from = ""  # a student, or a .pt of the original, to start with; its optimizer state is not used

    config.epochs = 100  # passes over the pictures
    config.batch_size = 64  # pictures of a step
    config.dtype = "float32"  # of activations: float32, or bfloat16, which is faster where the machine has it
    config.augment = True  # show the student changed pictures: colours, crops, mirrored, blurred
    config.learning_rate = 1e-3  # at the start
    config.weight_decay = 0.01  # of AdamW
    config.plateau_factor = 0.5  # of the learning rate, when the validation loss no longer falls
    config.plateau_patience = 1  # epochs without a better loss that are waited for
    config.plateau_threshold = 1e-3  # share of the best loss by which a better one is lower
    config.min_learning_rate = 1e-6  # the least

    config.image_size = 224  # of the student's input, in pixels
    config.patch_size = 28  # pixels of the side of a patch
    config.embed_dim = 512  # width of the teacher's embedding
    config.num_layers = 6  # of the student
    config.num_heads = 16  # of each layer; the network is as many channels wider than the embedding
    config.mlp_dim = 2112  # width of the MLP of a layer
    config.masked = True  # a patch sees its neighbours only
    config.same_norm = True  # all patch embeddings get one norm

    config.log_every = 50  # steps between progress lines
    return config
