"""config.run=check: what is in some data and what is wrong with it, before anything is trained."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax import checkpoints, loading
from paligemma_jax.checkpoints.mask_vae import load_mask_vae
from paligemma_jax.errors import ConfigError, DataError, ImageError
from paligemma_jax.files import expanded, write_json
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.processor import Processor
from paligemma_jax.runs import model as models
from paligemma_jax.runs import settings
from paligemma_jax.runs.folder import make_folder
from paligemma_jax.runs.notes import note
from paligemma_jax.training.data import sources
from paligemma_jax.training.data.augment import Augmentation, read_kinds
from paligemma_jax.training.data.examples import Examples
from paligemma_jax.training.data.masks import MaskCodec
from paligemma_jax.training.data.preview import Shown, write_preview
from paligemma_jax.training.data.report import ERRORS, WARNINGS, check_data

_REPORT = "report.json"
_NAMED = 3  # places of each kind of fault that are printed


def run(config: ConfigDict) -> int:
    """Look at everything; 1 when there are errors, which stop or spoil training, 0 when there are warnings at most."""
    if not config.data:
        raise DataError("no data is given: name a .jsonl file, or the folder of a data set, with --config.data=...")
    output_format = settings.one_of(config, "format", ("text", "json"))
    if config.preview and not config.output_dir:
        raise ConfigError("preview needs a place for its pictures: set output_dir too")
    sources.check_choices(config.data_format, config.data_task)
    kinds = read_kinds(config.augment)
    for key in ("text_length", "num_preview"):
        if config[key] < 1:
            raise ConfigError(f"{key}={config[key]} is not possible: give an integer of at least 1")
    models.check_weights(config)
    where = checkpoints.locate(config.checkpoint)
    processor = _processor(where)
    codec = MaskCodec(functools.partial(_mask_vae, where, config.mask_vae))
    splits = sources.all_splits(config.data, config.data_format)
    if config.val_data:
        others = sources.all_splits(config.val_data, config.data_format)
        splits |= {f"validation, {name}": found for name, found in others.items() if found not in splits.values()}

    def opened(found: sources.Found, bad_row: Callable[[DataError], None] | None = None) -> Examples:
        more = {} if bad_row is None else {"bad_row": bad_row}
        return sources.open_found(found, config.image_root, task=config.data_task, encode=codec.encode, **more)

    openers = {name: functools.partial(opened, found) for name, found in splits.items()}
    directory = make_folder(expanded(config.output_dir)) if config.output_dir else None
    if directory is None and config.preview:
        raise ConfigError("preview needs a place for its pictures: set output_dir too")
    report = check_data(openers, processor, config.text_length)
    print(json.dumps(report) if output_format == "json" else "\n".join(_lines(report)))
    if directory is not None:
        write_json(directory / _REPORT, report)
        note(f"wrote {directory / _REPORT}")
    if config.preview:
        first = next(iter(splits.values()))
        examples = opened(first, lambda error: None)
        augmentation = Augmentation(kinds, config.seed, codec) if kinds else None
        has_masks = loading.find_mask_vae(where, config.mask_vae or None) is not None
        write_preview(
            directory / "preview",
            _shown(examples, augmentation, config.num_preview),
            processor,
            functools.partial(_row_length, processor, config.text_length),
            codec.decode if has_masks else None,
        )
        note(f"wrote {directory / 'preview' / 'index.html'}")
    return 1 if report["errors"] else 0


def _processor(where: checkpoints.Source) -> Processor:
    """The processor of a checkpoint, without its weights."""
    contents = checkpoints.scan(where)
    tokenizer = loading.read_tokenizer(where)
    tokenizer.check(contents.config)
    return Processor(contents.config, tokenizer, loading.read_image_settings(where, contents.config))


def _mask_vae(where: checkpoints.Source, given: str) -> Any:
    path = loading.find_mask_vae(where, given or None)
    if path is None:
        raise ConfigError("mask codes need vae-oid.npz, which is not beside the model: name its file with mask_vae")
    return load_mask_vae(path)


def _shown(examples: Examples, augmentation: Augmentation | None, count: int) -> Iterator[Shown]:
    """Examples evenly from all; those whose pictures cannot be read are in the report."""
    for index in np.unique(np.linspace(0, len(examples) - 1, count).astype(int)).tolist():
        example = examples[index]
        try:
            images = [load_image(picture) for picture in example.images]
        except ImageError:
            continue
        prefix, suffix = example.prefix, example.suffix
        if augmentation is not None:
            images, prefix, suffix = augmentation(example, images, index)
        yield Shown(images, prefix, suffix, example.where)


def _row_length(processor: Processor, text_length: int, shown: Shown) -> int:
    """What a row is padded to; one that is too long for training is shown whole."""
    count = processor.count_prefix(shown.prefix, len(shown.images)) + processor.count_suffix(shown.suffix)
    return len(shown.images) * processor.config.vision.num_tokens + max(count, text_length)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    for name, record in report["splits"].items():
        yield f"{name}: {record['examples']} examples, {record.get('pictures', 0)} pictures"
        if record["examples"]:
            yield from _counts(record)
        for kinds, title in ((ERRORS, "error"), (WARNINGS, "warning")):
            for kind, fault in record[f"{title}s"].items():
                yield f"  {title}: {kinds[kind]}: {fault['count']}"
                yield from _places(fault["places"])
    if between := report["between"]["count"]:
        yield f"warning: pictures in two splits: {between}"
        yield from _places(report["between"]["places"])
    yield f"{report['errors']} kinds of errors, {report['warnings']} of warnings"


def _counts(record: dict[str, Any]) -> Iterator[str]:
    yield "  tasks: " + ", ".join(f"{name} {count}" for name, count in record["tasks"].items())
    if record["classes"]:
        named = ", ".join(f"{name or '(no label)'} {count}" for name, count in record["classes"].items())
        yield f"  objects: {record['objects']} ({named})" + ("; unbalanced" if record["unbalanced"] else "")
        yield f"  examples with a box that is there twice: {record['repeated_share']:.2%}"
    width, counts = record["lengths"]["width"], record["lengths"]["counts"]
    yield f"  tokens of prefix and suffix: {record['longest']} at most"
    for number, count in enumerate(counts):
        bar = "#" * round(40 * count / max(counts))
        yield f"    {number * width:5} to {number * width + width - 1:5}  {count:>8}  {bar}".rstrip()


def _places(places: list[str]) -> Iterator[str]:
    yield from (f"    {place}" for place in places[:_NAMED])
    if len(places) > _NAMED:
        yield f"    and {len(places) - _NAMED} more: {_REPORT} in output_dir names them"
