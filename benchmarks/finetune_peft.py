"""Fine-tuning beside transformers and PEFT: time of a step and peak memory, on the same weights and the same batch.

    python benchmarks/finetune_peft.py --their-python PYTHON [--checkpoint DIR] [--methods lora,full] [--dtype bfloat16]

PYTHON is an interpreter with torch, transformers and peft. Each side runs in processes of its own, by turns; the
fastest turn counts, and the largest memory. Without `--checkpoint` a small random model is written and used. A batch
has a picture, a prefix and a suffix of random tokens in each row; Adam, gradients clipped at 1, LoRA of rank 8 over the
seven projections of the decoder. What is narrower than float32 is the base: adapters, and on our side all that trains,
are float32.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import machine
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig

SMALL = PaliGemmaConfig(
    VisionConfig(image_size=112, patch_size=14, width=384, num_layers=6, mlp_dim=1536, num_heads=6),
    TextConfig(
        vocab_size=32128,
        width=512,
        num_layers=6,
        mlp_dim=2048,
        num_heads=8,
        num_kv_heads=1,
        head_dim=64,
        query_scalar=64.0,
        max_positions=1024,
    ),
    image_token_id=32000,
)
_PREFIX, _SUFFIX = 16, 32  # text tokens of a row
_LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--their-python", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune_peft"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a folder with a batch: be our side
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_ours(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint is None:
            options.checkpoint = Path(folder) / "small"
            write_small(options.checkpoint)
        write_batch(options.checkpoint, Path(folder) / "batch.npz", options.batch)
        found = {method: _compare(options, Path(folder), method) for method in options.methods.split(",")}
    name = options.name or f"{options.checkpoint.name}, {options.dtype}, batch of {options.batch}"
    entry = {"found": found, "machine": machine.describe() | machine.their_versions(options.their_python)}
    machine.keep(options.out, name, entry, document)


def write_small(directory: Path) -> None:
    """The small geometry with random weights of unit gain."""
    from flax.traverse_util import unflatten_dict

    from paligemma_jax import checkpoints

    rng, params = np.random.default_rng(0), {}
    for path, shape in checkpoints.expected_shapes(SMALL).items():
        scale = 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5 * (0.3 if "embed_tokens" in path else 1)
        params[path] = (rng.standard_normal(shape, np.float32) * scale).astype(np.float32)
    checkpoints.save(directory, SMALL, unflatten_dict(params, sep="/"))


def write_batch(checkpoint: Path, file: Path, rows: int) -> None:
    """The arrays of a `Batch`, without padding."""
    from paligemma_jax import checkpoints

    config = checkpoints.scan(checkpoints.locate(checkpoint)).config
    rng, count, side = np.random.default_rng(0), config.vision.num_tokens, config.vision.image_size
    length = count + _PREFIX + _SUFFIX
    tokens = rng.integers(3, min(config.image_token_id, 10_000), (rows, length), np.int32)
    tokens[:, :count] = config.image_token_id
    slots = np.full((rows, length), -1, np.int32)
    slots[:, :count] = np.arange(rows * count).reshape(rows, count)
    lengths = {"prefix_length": np.full(rows, count + _PREFIX, np.int32), "length": np.full(rows, length, np.int32)}
    pixels = rng.uniform(-1, 1, (rows, side, side, 3)).astype(np.float32)
    np.savez(file, pixels=pixels, tokens=tokens, image_slots=slots, **lengths)


def _compare(options: argparse.Namespace, folder: Path, method: str) -> dict[str, Any]:
    """Seconds of a step, peak memory in bytes, and the first losses, of either side."""
    here = Path(__file__)
    arguments = ["--checkpoint", options.checkpoint, "--dtype", options.dtype, "--steps", options.steps]
    ours = [sys.executable, here, "--their-python", "-", "--worker", folder, "--methods", method, *arguments]
    ours += ["--remat"] if options.remat else []
    theirs = [options.their_python, here.with_name("torch_finetune.py"), *arguments, "--batch", folder / "batch.npz"]
    theirs += ["--method", method, *(["--checkpointing"] if options.remat else [])]
    runs: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(options.turns):
        for side, command in (("ours", ours), ("theirs", theirs)):
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        side: {
            "step_s": min(run["step_s"] for run in found),
            "peak": max(run["peak"] for run in found),
            "losses": found[0]["losses"],
        }
        for side, found in runs.items()
    }


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    import functools

    import jax

    from paligemma_jax import checkpoints
    from paligemma_jax.models.paligemma import PaliGemma
    from paligemma_jax.training import methods
    from paligemma_jax.training.loss import suffix_loss
    from paligemma_jax.training.optimizer import Recipe, make_optimizer
    from paligemma_jax.training.step import init_state, make_step

    method = methods.Method(method=options.methods)
    stored = options.dtype if method.has_adapters else "float32"
    config, params = checkpoints.load(options.checkpoint, stored, progress=False)
    plan = methods.make_plan(method, SimpleNamespace(config=config, params=params), options.dtype, 0)
    del params
    recipe = Recipe(learning_rate=_LEARNING_RATE, warmup_fraction=0.0, weight_decay=0.0)
    optimizer = make_optimizer(recipe, 10**6)
    loss = functools.partial(suffix_loss, PaliGemma(config, remat=options.remat), 0.0, _SUFFIX)
    step = make_step(loss, optimizer, plan.frozen, plan.join)
    state = init_state(plan.trained, optimizer)
    del plan
    batch = dict(np.load(options.worker / "batch.npz"))
    step.compile(state, batch)
    losses, times = [], []
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    return {"step_s": float(np.median(times[2:])), "peak": _peak(), "losses": losses[:3]}


def _peak() -> int:
    """The largest resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def document(entries: dict[str, dict]) -> str:
    """The tables of all entries."""
    lines = ["# Fine-tuning beside transformers and PEFT", ""]
    for name, entry in entries.items():
        about = entry["machine"]
        versions = f"jax {about['jax']}, torch {about['torch']}, transformers {about['transformers']}"
        lines += [f"## {name}", "", f"{about['cpu']}, {about['cores']} cores, {versions}", ""]
        lines += ["| | step, ours | theirs | ratio | peak memory, ours | theirs | first losses, ours | theirs |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for method, sides in entry["found"].items():
            ours, theirs = sides["ours"], sides["theirs"]
            losses = (", ".join(f"{loss:.4f}" for loss in side["losses"]) for side in (ours, theirs))
            cells = (
                *(method, f"{ours['step_s']:.3f} s", f"{theirs['step_s']:.3f} s"),
                f"{ours['step_s'] / theirs['step_s']:.2f}",
                *(f"{side['peak'] / 1e9:.2f} GB" for side in (ours, theirs)),
                *losses,
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
