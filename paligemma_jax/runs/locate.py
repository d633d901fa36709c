"""config.run=locate: boxes and coarse masks of phrases, printed, drawn and exported as those of detect and segment."""

import json
from collections.abc import Sequence

from ml_collections import ConfigDict

import paligemma_jax as pj
from paligemma_jax.errors import ConfigError
from paligemma_jax.patch_vit.activation import phrase_maps
from paligemma_jax.patch_vit.locate import check_threshold, locate
from paligemma_jax.runs import exports, pair, settings
from paligemma_jax.runs.results import describe, write_drawn
from paligemma_jax.tasks import coco, export
from paligemma_jax.tasks.draw import draw
from paligemma_jax.tasks.prompts import split_labels
from paligemma_jax.tasks.select import select


def run(config: ConfigDict) -> int:
    """Find, and return the exit status: 1 when a picture could not be read."""
    pair.check(config)
    settings.choice(config)
    phrases, background = pair.phrases(config), split_labels(config.background)
    if both := set(phrases) & set(background):
        raise ConfigError(f"{min(both)!r} is in the prompt and in background: leave it out of one of them")
    check_threshold(config.threshold)
    kinds = settings.exports(config)
    if "coco" in kinds:
        coco.require()
    pictures = pair.Pictures(config.image)
    drawings = pair.claim(config, pictures.names)
    student, clip = pair.load(config)
    drawings.begin()
    rows = []
    for group in pictures.groups(config.batch_size):
        images = [source.image for _, source in group]
        maps = phrase_maps(student, clip, images, (*phrases, *background), config.windows, config.batch_size)
        for (stem, source), found in zip(group, maps, strict=True):
            objects = locate(found, source.image.size, config.threshold, len(background))
            chosen = select(objects, config.min_score, config.nms).kept  # what maps show without any object goes
            drawn = draw(source.image, chosen)
            files = []
            if chosen:
                path, files = write_drawn(drawn, chosen, drawings.directory, stem)
                drawings.own([path, *files])
            if kinds:
                rows.append(exports.row_of(source, chosen, "coco" in kinds))
            if config.format == "json":
                record = {"image": source.name, "prompt": config.prompt, **export.to_json(chosen, files)}
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                _say(source.name if len(pictures.names) > 1 else "", phrases, chosen)
    drawings.own(exports.write_rows(kinds, drawings.directory, rows, phrases))
    return 1 if pictures.failed else 0


def _say(name: str, phrases: Sequence[str], objects: Sequence[pj.Detection]) -> None:
    about = f"{name}: " if name else ""
    for item in objects:
        print(f"{about}{describe(item)}")
    for phrase in phrases:
        if all(item.label != phrase for item in objects):
            print(f"{about}{phrase}: not found")
    print(end="", flush=True)
