"""Builds the shipped patch ViT and its teacher from a seed; stop it at any time, the same command goes on."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "make_patch_vit"
    config.work_dir = "output/make_patch_vit"  # pictures, checkpoints and stages that are done; about 2 GB
    config.encoder_from = base.shipped("tiny")  # the PaliGemma whose image encoder the teacher starts from
    config.output_dir = base.shipped("patch_vit")  # the finished student and teacher

    config.num_scenes = 8_000  # pictures drawn to train on
    config.num_validation = 512  # and to validate on
    config.teacher_scenes = 7_000  # of them for the teacher, with as many close-ups
    config.teacher_steps = 1_500  # of the small CLIP
    config.teacher_learning_rate = 2e-3  # peak, after the warm-up
    config.teacher_batch_size = 128  # pictures of a step
    config.close_up_epochs = 12  # of the distillation from close-ups, a quarter of a scene each
    config.epochs = 10  # of that from whole scenes, at half the learning rate
    config.last_epochs = 2  # and at a tenth of it
    config.batch_size = 64  # pictures of a step
    config.learning_rate = 2e-3  # of the distillation, at the start
    config.masked = True  # a patch sees its neighbours only; False: what the mask is good for
    config.same_norm = True  # all patch embeddings get one norm; False: what that is good for
    config.scale = 0.5  # the norm of patch embeddings where they have one, which distillation leaves open
    return config
