"""Writes scenes of the shipped model's world as data sets that run=evaluate reads: something to try it on.

    python benchmarks/scenes_as_coco.py output/scenes --count 16

DIR/val/*.png, DIR/annotations/captions_val.json and instances_val.json as COCO has them (labels are shapes), and in
our own format DIR/caption.jsonl, answer.jsonl and detect.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paligemma_jax.shapes_world.questions import caption, sample_answer, sample_locate
from paligemma_jax.shapes_world.samples import Sample, scene_sample
from paligemma_jax.shapes_world.scenes import SHAPES
from paligemma_jax.tasks import coco
from paligemma_jax.tasks.detection import Detection, format_objects

SEED = 20_000_000  # of scenes that training has not seen


def write(directory: Path, count: int, seed: int = SEED) -> None:
    """Write the first scenes of a seed."""
    (directory / "val").mkdir(parents=True, exist_ok=True)
    (directory / "annotations").mkdir(exist_ok=True)
    images, captions, objects = [], [], []
    rows = {"caption": [], "answer": [], "detect": []}
    for number in range(1, count + 1):
        sample = scene_sample(seed, number - 1)
        name = f"{number:012d}.png"
        sample.image.save(directory / "val" / name)
        images.append(coco.image(number, name, sample.image.size))
        captions.append({"id": number, "image_id": number, "caption": caption(sample.kinds)})
        shapes = [Detection(shape, box) for (_, shape), box in zip(sample.kinds, sample.boxes, strict=True)]
        objects += coco.annotate(shapes, number, sample.image.size, SHAPES)
        for task, prefix, suffix in questions(sample, np.random.default_rng((seed, number))):
            rows[task].append({"image": f"val/{name}", "prefix": prefix, "suffix": suffix})
    annotations = directory / "annotations"
    (annotations / "captions_val.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (annotations / "instances_val.json").write_text(json.dumps(coco.to_dataset(images, objects, SHAPES)))
    for task, examples in rows.items():
        (directory / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))


def questions(sample: Sample, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Task, prefix and suffix of a caption, of a question in words and of one about boxes."""
    word = sample_answer(sample.kinds, rng)
    left = np.array([box[0] for box in sample.boxes])
    boxes = sample_locate("detect", sample.kinds, left, rng)
    true = [Detection(label, sample.boxes[index]) for index, label in boxes.objects]
    return [
        ("caption", "caption en", caption(sample.kinds)),
        ("answer", word.prefix, word.suffix),
        ("detect", boxes.prefix, format_objects(true, sample.image.size)),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=100, help="scenes")
    arguments = parser.parse_args()
    write(arguments.directory, arguments.count)
