"""Looking at data before training: counts, faults, and how examples look to the model."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "check"
    config.checkpoint = base.shipped("tiny")  # of the model that is to be trained: its tokenizer counts
    config.mask_vae = ""  # file of the mask VQ-VAE, if vae-oid.npz is not beside the weights
    config.data = ""  # as for training: a .jsonl file or a data set; all of its splits are looked at
    config.val_data = ""  # other data, to be looked for the same pictures
    config.image_root = ""  # folder that pictures are named from; by default the data's own
    config.data_format = "auto"  # jsonl, coco, yolo, voc, label_studio, csv or datasets; auto looks what it is
    config.data_task = "auto"  # what objects of a data set become: detect, or segment (with mask codes); auto is detect
    config.text_length = 128  # tokens of prefix and suffix together that training has room for
    config.format = "text"  # of what is printed: text or json
    config.output_dir = ""  # folder for report.json, which names every fault, and for the preview
    config.preview = False  # draw examples with their objects and their tokens, coloured by role
    config.num_preview = 8  # how many
    config.augment = ""  # changes at random of those, with commas: flip, crop, scale, color
    return config
