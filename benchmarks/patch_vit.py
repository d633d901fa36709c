"""Speed of a full-size patch ViT beside plain torch with the same weights, in turns on the same machine.

    python benchmarks/patch_vit.py --their-python PYTHON [--out benchmarks/results/patch_vit_speed]

PYTHON is an interpreter with torch and safetensors. Of each size the fastest of several turns counts. Training is the
step alone, without pictures and teacher, with AdamW, of 64 random pictures; `--train-dtype` is that of activations.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import machine
from paligemma_jax.patch_vit import Student, StudentConfig
from paligemma_jax.patch_vit.distill import distill_loss, trained
from paligemma_jax.patch_vit.plateau import Recipe, make_optimizer
from paligemma_jax.patch_vit.student import PatchViT
from paligemma_jax.training.step import init_state, make_step

_BATCHES = {1: 20, 64: 1}  # batch size -> runs of a turn
_TRAIN_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--their-python", required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--train-turns", type=int, default=3)
    parser.add_argument("--train-dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patch_vit_speed"))
    options = parser.parse_args()
    config = StudentConfig()
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
    params = jax.jit(PatchViT(config).init)(jax.random.key(0), np.zeros(pixels.shape, np.float32))["params"]
    student = Student(config, params)
    with tempfile.TemporaryDirectory() as folder:
        student.save(folder)
        program = Path(__file__).with_name("torch_patch_vit.py")
        files = [str(Path(folder) / name) for name in ("model.safetensors", "config.json")]
        command = [options.their_python, str(program), *files]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as theirs:
            found = {}
            for batch, count in _BATCHES.items():
                ours = functools.partial(_infer, student, batch)
                found[f"inference, batch {batch}"] = _in_turns(ours, theirs, "infer", batch, count, options.turns)
            ours = _trainer(student, options.train_dtype)
            name = f"training, batch {_TRAIN_BATCH}, {options.train_dtype}"
            found[name] = _in_turns(ours, theirs, "train", _TRAIN_BATCH, 1, options.train_turns)
            theirs.stdin.close()
    entry = {"found": found, "machine": machine.describe() | machine.their_versions(options.their_python)}
    machine.keep(options.out, f"full size, training in {options.train_dtype}", entry, document)


def _in_turns(ours: Any, theirs: subprocess.Popen, task: str, batch: int, count: int, turns: int) -> dict[str, float]:
    """The fastest turn of either, seconds a run; the first of each is left out."""
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(turns + 1):
        seconds["ours"].append(ours(count))
        theirs.stdin.write(json.dumps({"task": task, "batch": batch, "count": count}) + "\n")
        theirs.stdin.flush()
        seconds["torch"].append(json.loads(theirs.stdout.readline()))
    return {name: min(values[1:]) / count for name, values in seconds.items()}


def _infer(student: Student, batch: int, count: int) -> float:
    side = student.config.image_size
    pixels = np.random.default_rng(batch).normal(size=(batch, side, side, 3)).astype(np.float32)
    start = time.perf_counter()
    for _ in range(count):
        student.embed(pixels)
    return time.perf_counter() - start


def _trainer(student: Student, dtype: str) -> Any:
    cfg = student.config
    optimizer = make_optimizer(Recipe(), trained)
    state = init_state(jax.tree.map(np.array, student.params), optimizer)
    step = make_step(functools.partial(distill_loss, PatchViT(cfg), dtype), optimizer)
    rng = np.random.default_rng(0)
    batch = {
        "pixels": rng.normal(size=(_TRAIN_BATCH, cfg.image_size, cfg.image_size, 3)).astype(np.float32),
        "targets": rng.normal(size=(_TRAIN_BATCH, cfg.embed_dim)).astype(np.float32),
    }

    def run(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run


def document(entries: dict[str, dict]) -> str:
    """The tables of all entries."""
    lines = ["# Speed of the patch ViT", "", "Pictures a second, and the time relative to torch's.", ""]
    for name, entry in entries.items():
        about = entry["machine"]
        lines += [
            f"## {name}",
            "",
            f"{about['cpu']}, {about['cores']} cores, jax {about['jax']}, torch {about['torch']}",
            "",
        ]
        lines += ["| | ours | torch | time / torch's |", "|---|---|---|---|"]
        for what, seconds in entry["found"].items():
            batch = int(what.split("batch ")[1].split(",")[0])
            ours, theirs = (batch / seconds[key] for key in ("ours", "torch"))
            lines.append(f"| {what} | {ours:.1f} | {theirs:.1f} | {seconds['ours'] / seconds['torch']:.2f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
