"""Fine-tuning on your own pictures: JSON lines with image, prefix and suffix, or a data set with boxes."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "train"
    config.checkpoint = base.shipped("tiny")  # where to start from; for real tasks a pt checkpoint
    config.dtype = "float32"  # of activations and frozen weights; what trains is float32 always
    config.data = ""  # .jsonl file: {"image": "1.png", "prefix": "caption en", "suffix": "a cat"}; or see docs/data.md
    config.image_root = ""  # folder that pictures are named from; by default the file's own
    config.data_format = "auto"  # jsonl, coco, yolo, voc, label_studio, csv or datasets; auto looks what it is
    config.data_task = "auto"  # what objects of a data set become: detect, or segment (with mask codes); auto is detect
    config.augment = ""  # changes at random, with commas: flip, crop, scale, color
    config.data_threads = 4  # that decode pictures while a step runs
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
    config.schedule = "cosine"  # after the warm-up: cosine or linear, both to 0, or constant
    config.warmup_fraction = 0.05  # of all steps, in which the learning rate rises from 0
    config.lr_multipliers = ""  # by pattern, "vision_tower=0.1 ; .*=1": the first that fits; each parameter needs one
    config.weight_decay = 3e-7  # per step, by the schedule alone: not multiplied by any learning rate
    config.decayed = ""  # patterns of what decays; by default the kernels of image encoder and projector
    config.b1 = 0.9  # of Adam
    config.b2 = 0.999  # of Adam
    config.clip_norm = 1.0  # of the gradient over all that trains
    config.label_smoothing = 0.0  # probability spread over all other tokens
    config.dropout = 0.0  # share of the decoder's values that are dropped in training, in each residual branch
    config.ema = 0.0  # decay of a moving average of the parameters, 0.999 for one: what is measured and saved then

    config.val_data = ""  # .jsonl file of held-out examples, like data: their loss and answers are measured
    config.val_every = 0  # steps between validations; 0: an epoch
    config.val_examples = 256  # of them that are used, evenly spread; 0: all
    config.metric = "exact"  # of the answers (docs/evaluation.md), which says what is best; "" measures the loss alone
    config.patience = 0  # validations without a better one that end training; 0: none do
    config.keep_best = True  # keep the best model so far in output_dir/best; the last one is in output_dir
    config.log = ""  # tensorboard, wandb (offline unless WANDB_MODE=online), or both with a semicolon

    config.log_every = 10  # steps between progress lines
    config.save_every = 500  # steps between checkpoints
    config.save_minutes = 10.0  # and minutes, where that is sooner
    config.check_pictures = True  # read all pictures before training starts
    config.mesh = ""  # devices, as "data=2,fsdp=4" (tensor too), or auto: all, with weights and state divided (fsdp)
    config.coordinator = ""  # of several processes: HOST:PORT of the first, or auto where the cluster knows; see docs
    config.num_processes = 1  # how many there are, each with the same command but for `process_id`
    config.process_id = 0  # which this one is, from 0
    config.overwrite = False  # remove the training that `output_dir` holds, and begin anew
    return config
