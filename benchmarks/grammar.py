"""Measure the grammar of answers with boxes: what it costs per token, and whether answers that were right stay.

    python benchmarks/grammar.py
    python benchmarks/grammar.py --checkpoint DIR --dtype bfloat16 --scenes 0      # the time of a large model only

Asks for boxes and masks on the first scenes of the evaluation, freely and constrained, greedily and at temperature 1.
Then decodes the same number of steps with and without, taking turns, at batch 1 and 16. OUT.json holds every sample,
OUT.md the tables; a model that is measured again replaces its own part only.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine
from benchmarks.groups import decode, make_group, prefill
from paligemma_jax.config import variant_name
from paligemma_jax.errors import UserError
from paligemma_jax.shapes_world.questions import sample_locate
from paligemma_jax.shapes_world.samples import scene_sample
from paligemma_jax.tasks.prompts import read_prompt

ROOT = Path(__file__).resolve().parents[1]
_SEED = 20_000_000  # of the evaluation's scenes
_PROMPT = "segment red circle ; blue square ; star"
_STEPS = 4  # of one program run, timed together
_HEADER = """# The grammar of answers with boxes

"Malformed" are answers with an incomplete object or a label that was not asked for; "same" is the share of the other
free answers that the grammar leaves as they are. Milliseconds per decode step are medians over rounds that take turns,
with the lowest and the highest in brackets; the difference is the median over the rounds.
"""


def compare_answers(model: pj.PaliGemma, num_scenes: int) -> list[dict[str, Any]]:
    """Free and constrained answers about the same pictures, for each way of choosing."""
    pictures, prompts = [], []
    for index in range(num_scenes):
        sample = scene_sample(_SEED, index)
        rng, left = np.random.default_rng((_SEED, index, 2)), np.array([box[0] for box in sample.boxes])
        for task in ("detect", "segment"):
            pictures.append(sample.image)
            prompts.append(sample_locate(task, sample.kinds, left, rng).prefix)
    rows = []
    for temperature in tqdm((0.0, 1.0), desc="answers", unit="way") if num_scenes else ():
        sampling = pj.Sampling(temperature=temperature)
        free, bound = (model.generate(pictures, prompts, 128, sampling, constrain=c) for c in (False, True))
        proper = [_is_proper(*pair) for pair in zip(prompts, free, strict=True)]
        still_proper = [_is_proper(*pair) for pair in zip(prompts, bound, strict=True)]
        same = [a.text == b.text for a, b, good in zip(free, bound, proper, strict=True) if good]
        rows.append(
            {
                "temperature": temperature,
                "answers": len(prompts),
                "malformed_free": 1 - float(np.mean(proper)),
                "malformed_constrained": 1 - float(np.mean(still_proper)),
                "same": float(np.mean(same)),
            }
        )
    return rows


def _is_proper(prompt: str, output: pj.Output) -> bool:
    """Whether an answer has nothing but complete objects of the classes asked for."""
    found, dropped = pj.parse(output.text, (1000, 1000))
    return not dropped and {item.label for item in found} <= set(read_prompt(prompt).labels)


def time_steps(model: pj.PaliGemma, batch_size: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a decode step, free and constrained, of each round."""
    images = [Image.new("RGB", (64, 64), (200, 30, 30))] * batch_size
    num_tokens = _STEPS * (repeats + 2) + 1
    steps = [
        _stepper(model, images, pj.GenerateOptions(num_tokens, constrain=constrain, speculate=False))
        for constrain in (False, True)
    ]
    for step in steps:
        step()  # compiles
        step()
    columns: tuple[list[float], list[float]] = [], []
    for turn in tqdm(range(repeats), desc=f"batch {batch_size}", unit="round"):
        for which in ((0, 1), (1, 0))[turn % 2]:
            columns[which].append(steps[which]())
    return {"batch": batch_size, "free_ms": columns[0], "constrained_ms": columns[1]}


def _stepper(model: pj.PaliGemma, images: list[Image.Image], options: pj.GenerateOptions) -> Callable[[], float]:
    """A function that decodes some steps more and gives the milliseconds of one; rows that are done cost as much."""
    call, group = make_group(model, images, [_PROMPT] * len(images), options)
    state = prefill(call, group)

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state = decode(call, group, state, _STEPS)
        return 1e3 * (time.perf_counter() - start) / _STEPS

    return step


def document(entries: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown: a section for each model."""
    lines = [_HEADER]
    for name, entry in entries.items():
        about = entry["machine"]
        lines += [f"## {name}", "", f"{entry['date']}: {about['cpu']}, {about['cores']} cores, jax {about['jax']}.", ""]
        if entry["answers"]:
            lines += [
                "| temperature | answers | malformed, free | malformed, constrained | same |",
                "|---|---|---|---|---|",
            ]
            lines += [
                f"| {row['temperature']:g} | {row['answers']} | {row['malformed_free']:.1%} | "
                f"{row['malformed_constrained']:.1%} | {row['same']:.1%} |"
                for row in entry["answers"]
            ]
            lines.append("")
        lines += ["| batch | free, ms | constrained, ms | difference |", "|---|---|---|---|"]
        for row in entry["times"]:
            difference = statistics.median(np.divide(row["constrained_ms"], row["free_ms"]) - 1)
            spread = (_spread(row[key]) for key in ("free_ms", "constrained_ms"))
            lines.append(f"| {row['batch']} | {' | '.join(spread)} | {difference:+.1%} |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="assets/tiny", help="directory of the model")
    parser.add_argument("--name", help="what the tables call it; by default its variant, or its directory")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--scenes", default=500, type=int, help="of which answers are compared; 0 for none")
    parser.add_argument("--batch", default=[1, 16], type=int, nargs="+")
    parser.add_argument("--repeats", default=30, type=int, help="rounds that are timed")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/grammar", type=Path)
    args = parser.parse_args()
    if args.scenes < 0 or min(args.repeats, *args.batch) < 1:
        parser.error("repeats and batch are whole numbers of at least 1, scenes of at least 0")
    try:
        model = pj.load(args.checkpoint, dtype=args.dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    entry = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "answers": compare_answers(model, args.scenes),
        "times": [time_steps(model, size, args.repeats) for size in args.batch],
    }
    name = f"{args.name or variant_name(model.config) or Path(args.checkpoint).name}, {args.dtype}"
    machine.keep(args.out, name, entry, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
