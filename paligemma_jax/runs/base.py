"""Every key of a run with its default. `--help` shows the comments."""

from pathlib import Path

from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import data_folder

_FAMILIES = ("paligemma-3b", "paligemma2-3b", "paligemma2-10b", "paligemma2-28b")


def common() -> ConfigDict:
    """Keys of every run."""
    config = ConfigDict()
    config.run = "generate"  # what to do, one of the runs above
    config.checkpoint = ""  # directory, .npz, adapter, or hub id such as google/paligemma-3b-mix-224
    config.hub_id = ""  # where the weights are published; fetched only when `checkpoint` names it
    config.dtype = "bfloat16"  # of weights and activations: bfloat16, float16 or float32
    config.platform = "auto"  # auto, cpu, gpu or tpu
    config.seed = 0  # of all random draws
    config.compilation_cache = True  # keep compiled programs on disk, so that the next start is faster
    return config


def get_config() -> ConfigDict:
    """Keys of the runs that use a model: generate, chat and evaluate."""
    config = common()
    config.mesh = ""  # of devices: "data=2,tensor=4" divides rows over 2 and weights over 4; auto takes all there are
    config.adapter = ""  # directory or hub id of a PEFT adapter (LoRA), merged into the checkpoint while it is read
    config.quantization = "none"  # of the weights: none, int8 (half of bfloat16) or int4 (under a third)
    config.resample = "auto"  # how pictures are resized: bicubic, bilinear, or auto, as the checkpoint says
    config.mask_vae = ""  # file of the mask decoder, if vae-oid.npz is not beside the weights

    config.image = shipped("examples/shapes.png")  # path, URL, folder, or glob in quotes; a video's path too
    config.video_fps = 1.0  # frames looked at of each second of a video
    config.prompt = "caption en"  # "answer en where is the cat?", "detect cat ; dog", "segment cat", "ocr"
    config.prompts_file = ""  # text file with a prompt per line, asked of each picture instead of `prompt`
    config.prompt_form = "{task} {classes}"  # of detect and segment; bare: a class alone, each in its own prompt
    config.split_classes = False  # ask a detect or segment prompt once per class, and put the answers together
    config.max_new_tokens = 100  # longest answer
    config.batch_size = 16  # answers that are generated together; fewer where prompts are long

    config.temperature = 0.0  # 0 takes the likeliest token (greedy); higher is more varied
    config.top_k = 0  # draw among the k likeliest tokens only; 0 means all
    config.top_p = 1.0  # draw among the fewest tokens that hold this probability together; 1 means all
    config.min_p = 0.0  # draw among tokens at least this much as probable as the likeliest; 0 means all
    config.num_beams = 1  # above 1: beam search of so many
    config.speculate = "auto"  # propose draft tokens and check them at once, which changes no answer: on, off or auto

    config.format = "text"  # text, or json: one object per line
    config.stream = False  # print an answer while it is generated
    config.constrain = False  # answers to detect and segment can only be complete objects of the classes asked for
    config.min_score = 0.0  # objects with a lower score, 0 to 1, are left out
    config.nms = 0.0  # IoU above which the lower scored of two boxes of a label is left out; 0: only of equal boxes
    config.export = ""  # coco, yolo or both with a comma: files of all objects, in `output_dir`
    config.output_dir = ""  # folder for pictures with boxes and masks drawn on them, and for the masks
    config.resume = False  # go on with the run that `output_dir` holds, skipping what is done
    config.overwrite = False  # remove the results of the run that `output_dir` holds, and begin anew
    config.save_embeddings = ""  # .npy file for the pictures' embeddings
    config.load_embeddings = ""  # .npy file of embeddings to use instead of the pictures' own
    config.embeddings = "projected"  # which: projected (soft tokens), or features (before the projector)
    config.profile = ""  # folder for a profiler trace of all that follows loading
    config.loc_scale = 1023  # location token of the far edge: 1023, or 1024 for models that were trained so

    config.measure = "answers"  # what evaluate measures: answers, or pointing (where attention and similarity maps lie)
    config.data = "scenes"  # on which pictures: scenes or wide, or of another program: foreign or wide_foreign
    config.num_scenes = 500  # how many of them
    config.scenes_seed = 20_000_000  # which of them: the shipped model has not seen these
    config.output = ""  # JSON file for what evaluate measured
    return config


def released(family: str, kind: str) -> ConfigDict:
    """A published model: one of the families, and what it is for with its size, such as "mix-224"."""
    if family not in _FAMILIES:
        raise ConfigError(f"there is no model {family!r}: give one of {', '.join(_FAMILIES)} after the colon")
    config = get_config()
    config.hub_id = f"google/{family}-{kind}"
    config.checkpoint = f"checkpoints/{family}-{kind}"
    return config


def shipped(name: str) -> str:
    """Path of a file that is shipped, short when seen from here."""
    path = data_folder("assets") / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
