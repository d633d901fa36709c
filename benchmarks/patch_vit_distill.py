"""Distillation of a full-size patch ViT by the real command beside a plain torch loop, in turns on the same machine.

    python benchmarks/patch_vit_distill.py --their-python PYTHON [--out benchmarks/results/patch_vit_distill]

PYTHON is an interpreter with torch and this repository's requirements. Both read a folder of pictures, change them
alike, and take a step of AdamW for each batch; the torch loop decodes in two processes of a `DataLoader`. The teacher
is a ViT-B/32 with random weights, what it says is kept by the command; the torch loop has it as an array. Pictures a
second are those of the epochs after the first, without start, compiling, validation and saving.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import machine
from paligemma_jax.patch_vit import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig, Student, StudentConfig, weights
from paligemma_jax.patch_vit.tokenizer import END
from paligemma_jax.shapes_world.samples import scene_sample
from paligemma_jax.shapes_world.teacher_stage import phrases, train_vocabulary

ROOT = Path(__file__).resolve().parents[1]
_SIZE = (320, 240)  # of a picture
_BATCH = 64
_SPEED = re.compile(r"distill (\d+)/\d+ .* ([\d.]+) steps/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--their-python", required=True)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of activations of the command; torch has float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patch_vit_distill"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.pictures)
        speeds: dict[str, list[float]] = {"ours": [], "torch": []}
        for turn in range(options.rounds):
            speeds["ours"].append(ours(folder, turn, options.epochs, options.dtype))
            speeds["torch"].append(theirs(folder, options.their_python, options.epochs))
            print({key: round(values[-1], 2) for key, values in speeds.items()}, file=sys.stderr)
    about = machine.describe() | machine.their_versions(options.their_python)
    entry = {"speeds": speeds, "machine": about, "pictures": options.pictures}
    machine.keep(options.out, f"full size, {options.dtype}", entry, document)


def prepare(folder: Path, count: int) -> None:
    """Pictures, a teacher, and a student for the torch loop to start with."""
    for name, number in (("train", count), ("val", 8)):
        (folder / name).mkdir()
        for i in range(number):
            scene_sample(len(name), i).image.resize(_SIZE).save(folder / name / f"{i}.png")
    vision = ClipVisionConfig(224, 32, 768, 12, 3072, 12, 1e-5)
    tokenizer = train_vocabulary(phrases())
    text = ClipTextConfig(len(tokenizer.vocabulary), num_layers=1, eos_token_id=tokenizer.vocabulary[END])
    config, student = ClipConfig(vision, text), StudentConfig()
    Clip(config, random_params(weights.clip_shapes(config)), tokenizer).save(folder / "teacher")
    Student(student, random_params(weights.student_shapes(student))).save(folder / "student")
    targets = np.random.default_rng(0).standard_normal((count, student.embed_dim))
    np.save(folder / "targets.npy", targets.astype(np.float32))


def random_params(shapes: dict) -> dict:
    """Weights that keep activations of unit size; norms have ones."""
    rng, tree = np.random.default_rng(0), {}
    for path, shape in shapes.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        fan_in = np.prod(shape[1:])
        norm = parents and parents[-1].endswith(("norm", "ln_1", "ln_2", "ln_pre", "ln_post"))
        values = rng.standard_normal(shape) * fan_in**-0.5 if len(shape) > 1 else np.full(shape, float(bool(norm)))
        node[leaf] = values.astype(np.float32)
    return tree


def ours(folder: Path, turn: int, epochs: int, dtype: str) -> float:
    """Pictures a second of the command: the median of the epochs after the first."""
    steps = len(list((folder / "train").iterdir())) // _BATCH
    keys = {"teacher": folder / "teacher", "train": folder / "train", "val": folder / "val", "dtype": dtype}
    keys |= {"output_dir": folder / f"out{turn}", "cache": folder / "teacher.sqlite", "batch_size": _BATCH}
    keys |= {"epochs": epochs, "log_every": steps, "platform": "cpu"}
    arguments = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, str(ROOT / "main.py"), "--config=configs/patch_vit_distill.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = [float(match[2]) for match in _SPEED.finditer(done.stderr) if int(match[1]) > steps]
    return _BATCH * statistics.median(found)


def theirs(folder: Path, python: str, epochs: int) -> float:
    """The same of the torch loop."""
    program = Path(__file__).with_name("torch_patch_vit_distill.py")
    command = [python, str(program), str(folder), str(epochs), str(_BATCH)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return statistics.median(json.loads(done.stdout)[1:])


def document(entries: dict[str, dict]) -> str:
    """The tables of all entries."""
    lines = ["# Distillation by the real command", "", "Pictures a second, each round of either.", ""]
    for name, entry in entries.items():
        about, rounds = entry["machine"], entry["speeds"]
        lines += [
            f"## {name}",
            "",
            f"{about['cpu']}, {about['cores']} cores, jax {about['jax']}, torch {about['torch']}; batches of {_BATCH} "
            f"of {entry['pictures']} pictures of {_SIZE[0]} x {_SIZE[1]}",
            "",
            "| | ours | torch | ours / torch |",
            "|---|---|---|---|",
        ]
        for turn, pair in enumerate(zip(rounds["ours"], rounds["torch"], strict=True), 1):
            lines.append(f"| round {turn} | {pair[0]:.2f} | {pair[1]:.2f} | {pair[0] / pair[1]:.2f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
