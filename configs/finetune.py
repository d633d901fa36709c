"""Fine-tuning on your own pictures: JSON lines with image, prefix and suffix."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "train"
    config.checkpoint = base.shipped("tiny")  # where to start from; for real tasks a pt checkpoint
    config.dtype = "float32"  # of activations and frozen weights; what trains is float32 always
    config.data = ""  # .jsonl file: {"image": "1.png", "prefix": "caption en", "suffix": "a cat"} on each line
    config.image_root = ""  # folder that pictures are named from; by default the file's own
    config.output_dir = "output/finetune"  # the tuned model, its adapter/, and the state to resume from

    config.method = "full"  # what trains: full (everything), decoder, lora (adapters), qlora (over int4 or int8)
    config.trainable = ""  # names or patterns of what trains instead; with lora and qlora, beside the adapters
    config.freeze = ""  # names or patterns of what does not: "vision_tower multi_modal_projector"
    config.lora_rank = 8  # of each adapter
    config.lora_alpha = 16.0  # adapters count alpha / rank times
    config.lora_targets = "decoder"  # what has adapters: decoder, all (every linear layer), or names and patterns
    config.use_rslora = False  # alpha / sqrt(rank) instead
    config.use_dora = False  # train the norms of the rows apart (DoRA)
    config.quantization = "auto"  # of what qlora is over: int4, int8, or auto: as the checkpoint has it, else int4
    config.verify = False  # compare answers of the tuned model with those that transformers gives

    config.epochs = 15  # passes over the data
    config.batch_size = 32  # examples of a step
    config.accumulate = 1  # parts that a batch is computed in, one after the other, to take less memory
    config.remat = "none"  # layers: compute the inside of each layer again for its gradient, to take less memory
    config.text_length = 128  # tokens of prefix and suffix together; longer examples are an error
    config.learning_rate = 0.0  # peak, after the warm-up; 0 is the method's: 1e-5, of adapters 1e-4
    config.warmup_fraction = 0.05  # of all steps; a cosine to 0 follows
    config.weight_decay = 3e-7  # per step, not multiplied by the learning rate
    config.b2 = 0.999  # of Adam
    config.clip_norm = 1.0  # of the gradient over all that trains
    config.label_smoothing = 0.0  # probability spread over all other tokens

    config.log_every = 10  # steps between progress lines
    config.save_every = 500  # steps between checkpoints
    config.save_minutes = 10.0  # and minutes, where that is sooner
    config.check_pictures = True  # read all pictures before training starts
    config.overwrite = False  # remove the training that `output_dir` holds, and begin anew
    return config
