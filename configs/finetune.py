"""Fine-tuning on your own pictures: JSON lines with image, prefix and suffix, or a data set with boxes."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "train"
    config.checkpoint = base.shipped("tiny")  # where to start from; for real tasks a pt checkpoint
    config.dtype = "float32"  # of weights and optimizer state
    config.data = ""  # .jsonl file: {"image": "1.png", "prefix": "caption en", "suffix": "a cat"}; or see docs/data.md
    config.image_root = ""  # folder that pictures are named from; by default the file's own
    config.data_format = "auto"  # jsonl, coco, yolo, voc, label_studio, csv or datasets; auto looks what it is
    config.data_task = "auto"  # what objects of a data set become: detect, or segment (with mask codes); auto is detect
    config.augment = ""  # changes at random, with commas: flip, crop, scale, color
    config.data_threads = 4  # that decode pictures while a step runs
    config.output_dir = "output/finetune"  # the tuned model, and the state to resume from

    config.epochs = 15  # passes over the data
    config.batch_size = 32  # examples of a step
    config.text_length = 128  # tokens of prefix and suffix together; longer examples are an error
    config.learning_rate = 1e-5  # peak, after the warm-up
    config.warmup_fraction = 0.05  # of all steps; a cosine to 0 follows
    config.weight_decay = 3e-7  # per step, not multiplied by the learning rate
    config.b2 = 0.999  # of Adam
    config.clip_norm = 1.0  # of the gradient over all parameters
    config.label_smoothing = 0.0  # probability spread over all other tokens

    config.log_every = 10  # steps between progress lines
    config.save_every = 500  # steps between checkpoints
    config.save_minutes = 10.0  # and minutes, where that is sooner
    config.check_pictures = True  # read all pictures before training starts
    config.overwrite = False  # remove the training that `output_dir` holds, and begin anew
    return config
