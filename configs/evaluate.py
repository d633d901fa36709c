"""Measuring a model on a data set of the field, read from its public files: docs/evaluation.md lists the tasks."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    usual = base.get_config()
    for key in ("adapter", "quantization", "resample", "mask_vae", "loc_scale", "format"):
        config[key] = usual[key]
    config.run = "evaluate"
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"

    config.task = "jsonl"  # coco_captions, vqav2, textvqa, docvqa, chartqa, refcoco, ... or jsonl, for data of your own
    config.data = ""  # folder of the data set, as it was unpacked; of jsonl the file too
    config.split = ""  # part of the data set; by default the task's usual one
    config.limit = 0  # only so many examples, evenly spread over the data set; 0: all
    config.metric = ""  # what is measured instead of the task's own: names with commas, the main one first
    config.prompt = ""  # what is asked instead, with the task's fields in braces, as in "answer en {question}"
    config.max_new_tokens = 0  # longest answer; 0: the task's own
    config.num_beams = 0  # above 1: beam search of so many; 0: the task's own
    config.batch_size = 16  # examples that are answered together
    config.output_dir = ""  # folder for each answer with its scores and for the result; a stopped run goes on there
    config.overwrite = False  # remove the results that `output_dir` holds, and begin anew
    config.resamples = 1000  # bootstrap resamples for the interval
    return config
