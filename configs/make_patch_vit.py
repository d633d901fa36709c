"""Builds the shipped patch ViT and its teacher from a seed; stop it at any time, the same command goes on."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "make_patch_vit"
    config.work_dir = "output/make_patch_vit"  # pictures, checkpoints and stages that are done; about 2 GB
    config.encoder_from = base.shipped("tiny")  # the PaliGemma whose image encoder the teacher starts from
    config.output_dir = base.shipped("patch_vit")  # the finished student and teacher

    config.num_scenes = 16_000  # pictures drawn to train on
    config.num_validation = 512  # and to validate on
    config.teacher_steps = 3_000  # of the small CLIP
    config.teacher_learning_rate = 2e-3  # peak, after the warm-up
    config.teacher_batch_size = 128  # pictures of a step
    config.epochs = 12  # of the distillation
    config.batch_size = 64  # pictures of a step
    config.learning_rate = 2e-3  # of the distillation, at the start
    config.masked = True  # a patch sees its neighbours only; False: what the mask is good for
    config.same_norm = True  # all patch embeddings get one norm; False: what that is good for
    return config
