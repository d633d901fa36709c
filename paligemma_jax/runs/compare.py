"""config.run=compare: where a student looks, beside its teacher, and beside the image encoder of a PaliGemma."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.files import write_arrays
from paligemma_jax.inspection.maps import similarity_between
from paligemma_jax.patch_vit import drawing
from paligemma_jax.patch_vit.comparison import Comparison, compare, square
from paligemma_jax.runs import model as models
from paligemma_jax.runs import pair


def run(config: ConfigDict) -> int:
    """Draw, and return the exit status: 1 when a picture could not be read."""
    pair.check(config)
    pictures = pair.Pictures(config.image)
    drawings = pair.claim(config, pictures.names)
    student, clip = pair.load(config)
    paligemma = _paligemma(config) if config.checkpoint else None
    drawings.begin()
    for group in pictures.groups(config.batch_size):
        found = compare(student, clip, [source.image for _, source in group], config.batch_size)
        for (stem, source), comparison in zip(group, found, strict=True):
            maps = _maps(comparison, source.image, paligemma)
            files = drawings.own(drawings.directory / f"{stem}_compare.{kind}" for kind in ("png", "npz"))
            drawing.save_png(drawing.strip(source.image, *zip(*maps.values(), strict=True)), files[0])
            write_arrays(files[1], {name: values for name, (values, _) in maps.items()})
            _report(config, source.name, comparison, files)
    return 1 if pictures.failed else 0


def _maps(found: Comparison, image: Image.Image, paligemma: pj.PaliGemma | None) -> dict[str, tuple[np.ndarray, str]]:
    """Maps by their names, each with its label."""
    side, other = len(found.student), len(found.teacher)
    maps = {
        "student": (found.student, f"student {side} x {side}"),
        "resized": (found.resized, f"student at {other} x {other}"),
        "teacher": (found.teacher, f"teacher's attention {other} x {other}"),
    }
    if paligemma:
        values = _similarity(paligemma, image, found)
        maps["paligemma"] = values, f"PaliGemma {len(values)} x {len(values)}: like student's best"
    return maps


def _report(config: ConfigDict, name: str, found: Comparison, files: list[Path]) -> None:
    correlation = None if np.isnan(found.correlation) else round(found.correlation, 4)
    if config.format == "json":
        record = {"image": name, "correlation": correlation, "files": list(map(str, files))}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    said = "is not defined, as a map is even" if correlation is None else f"{correlation:.2f}"
    print(f"{name}: correlation of student and teacher {said}")
    print(f"wrote {', '.join(map(str, files))}", flush=True)


def _paligemma(config: ConfigDict) -> pj.PaliGemma:
    models.check_weights(config)
    return pj.load(config.checkpoint, dtype=models.dtype(config))


def _similarity(model: pj.PaliGemma, image: Image.Image, found: Comparison) -> np.ndarray:
    """How like each patch of the image encoder is to the one where the student looks most: [G, G], 0..1."""
    features = np.asarray(model.embed_image(image, projected=False), np.float32)[0]
    similarity = similarity_between(features)
    side = len(square(similarity[0]))
    row, column = divmod(int(found.student.argmax()), len(found.student))
    row, column = (int((place + 0.5) * side / len(found.student)) for place in (row, column))
    return np.maximum(square(similarity[row * side + column]), 0)
