"""Measures the shipped patch ViT on scenes it has not seen, and students that were distilled otherwise beside it.

    python benchmarks/patch_vit_quality.py [--student NAME=DIR ...] [--out benchmarks/results/patch_vit]

Every student takes the teacher of --teacher. What the columns mean: shapes_world/patch_evaluation.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from paligemma_jax import patch_vit
from paligemma_jax.shapes_world.patch_evaluation import evaluate

_COLUMNS = ("recall_1", "recall_5", "recall_10", "pointing", "inside", "iou")
_HEADER = ("recall@1", "recall@5", "recall@10", "pointing", "mass inside", "IoU of locate")


def document(entries: dict[str, dict]) -> str:
    """The table of all students."""
    lines = ["# The patch ViT on unseen scenes", ""]
    lines += ["What the columns mean: `shapes_world/patch_evaluation.py`. A dash: does not apply.", ""]
    for name, entry in entries.items():
        found, counts = entry["found"], entry["found"]["counts"]
        lines += [f"## {name}", ""]
        lines += [
            f"{counts['scenes']:.0f} scenes, {counts['captions']:.0f} captions, {counts['shapes']:.0f} shapes.",
            "",
        ]
        lines += ["| | " + " | ".join(_HEADER) + " |", "|---|" + "---|" * len(_HEADER)]
        for method in ("student", "teacher", "cls_attention", "training_free", "chance"):
            cells = [f"{found[method][key]:.3f}" if key in found[method] else "-" for key in _COLUMNS]
            lines.append(f"| {method.replace('_', ' ')} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="assets/patch_vit/teacher")
    parser.add_argument("--student", action="append", help="NAME=DIR")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patch_vit"))
    options = parser.parse_args()
    clip = patch_vit.load_clip(options.teacher)
    for given in options.student or ["shipped=assets/patch_vit/student"]:
        name, _, directory = given.partition("=")
        entry = {"found": evaluate(patch_vit.load(directory), clip, options.scenes), "machine": machine.describe()}
        machine.keep(options.out, name, entry, document)


if __name__ == "__main__":
    main()
