"""Rows about many pictures in files: resumable, from folders, lists, tables and tars, on one machine or a cluster."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base

_AS_GENERATE = (
    *("adapter", "quantization", "resample", "mask_vae", "prompt", "prompts_file", "prompt_form", "split_classes"),
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "num_beams", "speculate", "constrain"),
    *("min_score", "nms", "loc_scale", "profile"),
)


def get_config() -> ConfigDict:
    config = base.common()
    usual = base.get_config()
    for key in _AS_GENERATE:
        config[key] = usual[key]
    config.run = "annotate"
    config.checkpoint = base.shipped("tiny")
    config.dtype = "float32"

    config.image = base.shipped("examples")  # folder, glob in quotes, .txt list, .csv, .tsv, .parquet, WebDataset .tar
    config.image_column = ""  # of a table, with paths or bytes; of a tar, the ending of its pictures
    config.image_root = ""  # folder that relative paths in a list or table start from; by default the file's own
    config.output_dir = "output/annotate"  # folder for the rows, from which a run that was stopped goes on
    config.shard_format = "jsonl"  # of the rows: jsonl or parquet
    config.shard_size = 1000  # pictures whose rows share a file
    config.export = ""  # coco, yolo, fiftyone, labelstudio, or some with commas: files of all objects, made at the end
    config.retry_failed = False  # ask again about pictures that failed before
    config.overwrite = False  # begin anew where the folder has other rows

    config.batch_size = 16  # pictures that are answered together
    config.threads = 4  # that read and decode pictures ahead of the device
    config.engine = "local"  # local, or ray: one process for each device of a Ray cluster
    config.workers = 0  # processes of engine=ray; 0: one for each GPU, or for each machine without any
    return config
