"""Choose the defaults of run=locate: thresholds and least scores, on scenes that nothing else is measured on.

    python benchmarks/patch_vit_locate.py

Each scene is asked for its own kinds of shapes and for some that are not in it, all at once. OUT.md has the table.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from paligemma_jax import patch_vit
from paligemma_jax.files import write_text
from paligemma_jax.patch_vit.activation import PhraseMaps, phrase_maps
from paligemma_jax.patch_vit.locate import locate
from paligemma_jax.shapes_world.samples import Sample, scene_sample
from paligemma_jax.shapes_world.scenes import COLORS, SHAPES
from paligemma_jax.tasks.overlap import box_iou, mask_iou
from paligemma_jax.tasks.select import above

ROOT = Path(__file__).resolve().parents[1]
_SEED = 30_000_000  # neither of training nor of the evaluation
_KINDS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
_HEADER = """# Defaults of run=locate

Each scene is asked for its kinds of shapes and for three that are not in it. IoU is that of a shape and the best object
of its name, 0 where there is none, over shapes that are the only ones of their kind. "Falsely found" is the share of
the kinds that are not there and have an object all the same.

"""


def asked(sample: Sample, absent: int, rng: np.random.Generator) -> list[str]:
    """The kinds in a scene, each once, and some others."""
    there = list(dict.fromkeys(" ".join(kind) for kind in sample.kinds))
    others = [kind for kind in _KINDS if kind not in there]
    return [*there, *(others[i] for i in rng.choice(len(others), absent, replace=False))]


def measure(
    samples: Sequence[Sample], maps: Sequence[PhraseMaps], threshold: float, scores: Sequence[float]
) -> Iterator[tuple[float, float, float, float]]:
    """For each least score: itself, mean IoU of boxes and of masks, share of kinds that are falsely found."""
    found = [locate(item, sample.image.size, threshold) for item, sample in zip(maps, samples, strict=True)]
    for score in scores:
        boxes, masks, false = [], [], []
        for sample, item, objects in zip(samples, maps, found, strict=True):
            kinds, kept = [" ".join(kind) for kind in sample.kinds], above(objects, score)
            for phrase in item.phrases:
                best = next((one for one in kept if one.label == phrase), None)
                if phrase not in kinds:
                    false.append(best is not None)
                elif kinds.count(phrase) == 1:
                    place = kinds.index(phrase)
                    boxes.append(box_iou(best.box, sample.boxes[place]) if best else 0.0)
                    masks.append(mask_iou(best.mask, sample.masks[place]) if best else 0.0)
        yield score, float(np.mean(boxes)), float(np.mean(masks)), float(np.mean(false))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", default=ROOT / "assets/patch_vit", type=Path, help="folder with student and teacher")
    parser.add_argument("--scenes", default=300, type=int)
    parser.add_argument("--absent", default=3, type=int, help="kinds that are asked for and are not in a scene")
    parser.add_argument("--thresholds", default="0.4,0.5,0.6,0.7,0.8,0.9", help="with commas")
    parser.add_argument("--scores", default="0,0.2,0.3,0.4,0.5,0.6,0.7", help="least scores, with commas")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/patch_vit_locate", type=Path)
    args = parser.parse_args()
    student, clip = patch_vit.load(args.pair / "student"), patch_vit.load_clip(args.pair / "teacher")
    rng = np.random.default_rng(0)
    samples = [scene_sample(_SEED, index) for index in range(args.scenes)]
    every = phrase_maps(student, clip, [sample.image for sample in samples], _KINDS, batch_size=64)
    maps = []
    for sample, item in zip(samples, every, strict=True):
        rows = [_KINDS.index(phrase) for phrase in asked(sample, args.absent, rng)]
        maps.append(PhraseMaps(tuple(_KINDS[row] for row in rows), item.logits[rows], item.units[rows]))
    about = machine.describe()
    lines = [
        f"{datetime.date.today().isoformat()}: {args.scenes} scenes, jax {about['jax']}.",
        "",
        "| threshold | min_score | IoU of boxes | of masks | falsely found |",
        "|---|---|---|---|---|",
    ]
    for threshold in map(float, args.thresholds.split(",")):
        for values in measure(samples, maps, threshold, list(map(float, args.scores.split(",")))):
            lines.append(f"| {threshold:g} | {values[0]:g} | " + " | ".join(f"{v:.3f}" for v in values[1:]) + " |")
    text = _HEADER + "\n".join([*lines, ""])
    print(text)
    write_text(args.out.with_suffix(".md"), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
