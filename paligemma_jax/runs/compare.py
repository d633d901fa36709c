"""config.run=compare: where a student looks, beside its teacher, and beside the image encoder of a PaliGemma."""

import json

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
    directory = pair.folder(config)
    student, clip = pair.load(config)
    paligemma = _paligemma(config) if config.checkpoint else None
    for stem, source in pictures:
        (found,) = compare(student, clip, [source.image])
        names, maps = ["student", "resized", "teacher"], [found.student, found.resized, found.teacher]
        labels = [f"{name} {len(values)} x {len(values)}" for name, values in zip(names, maps, strict=True)]
        labels[1] = f"student at {len(found.resized)} x {len(found.resized)}"
        if paligemma:
            names.append("paligemma")
            maps.append(_similarity(paligemma, source.image, found))
            labels.append(f"PaliGemma {len(maps[-1])} x {len(maps[-1])}, like the student's best")
        files = [directory / f"{stem}_compare.png", directory / f"{stem}_compare.npz"]
        drawing.save_png(drawing.strip(source.image, maps, labels), files[0])
        write_arrays(files[1], dict(zip(names, maps, strict=True)))
        correlation = None if np.isnan(found.correlation) else round(found.correlation, 4)
        if config.format == "json":
            record = {"image": source.name, "correlation": correlation, "files": list(map(str, files))}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            said = "not defined, a map is even" if correlation is None else f"{correlation:.2f}"
            print(f"{source.name}: correlation of student and teacher {said}")
            print(f"wrote {', '.join(map(str, files))}", flush=True)
    return 1 if pictures.failed else 0


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
