"""Where the time of a stage goes: JAX's own trace of one run, added up by kind of operation.

    python benchmarks/operations.py --checkpoint assets/tiny --stage decode --rows 16

Prints a Markdown table. Products and sums that XLA leaves to a library are told apart by their shapes, everything else
by XLA's names. Operations may run side by side, so that their times can add up to more than the stage took.
"""

import argparse
import collections
import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine
from benchmarks.groups import make_group
from paligemma_jax import ops
from paligemma_jax.engine import steps
from paligemma_jax.errors import UserError

STAGES = ("vision", "prefill", "decode")
_PROMPT = "answer en what is in the picture?"
_STEPS = 8  # of a run of decode
_RUNS = 5  # that are timed, after one that is not and before the one that is traced
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)")
_LAYOUT = re.compile(r"\{[^}]*\}")

Stage = tuple[Callable[[], Any], str, int]  # runs it once, the text of its program, the steps in a run


def make_stage(model: pj.PaliGemma, name: str, rows: int) -> Stage:
    """A stage of a batch of so many rows, each with an image of its own."""
    size, params = model.config.vision.image_size, model.params
    images = list(np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8))
    if name == "vision":
        pixels = model.processor(images, _PROMPT).pixels
        program = ops.compiled(
            model.runner.target, steps.run, params, pixels, config=model.config, method="embed_image"
        )
        return lambda: program(params, pixels), program.as_text(), 1
    num_tokens = (_RUNS + 2) * _STEPS + 1
    options = pj.GenerateOptions(num_tokens, min_new_tokens=num_tokens)
    _, group = make_group(model, images, [_PROMPT] * rows, options)
    strategy, arguments = group.strategy, (params, group.inputs, group.options)
    program = ops.compiled(model.runner.target, strategy.prefill, *arguments, **strategy.prefill_static)
    if name == "prefill":
        return lambda: program(*arguments), program.as_text(), 1
    static = strategy.decode_static | {"num_steps": _STEPS}
    states = [program(*arguments)]  # each run goes on from the last one
    step = ops.compiled(model.runner.target, strategy.decode, params, states[0], **static)

    def run() -> jax.Array:
        states.append(step(params, states.pop()))
        return states[-1].tokens

    return run, step.as_text(), _STEPS


def milliseconds(stage: Stage) -> float:
    """Median time of a step."""
    run, _, steps = stage
    jax.block_until_ready(run())
    samples = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        samples.append(1e3 * (time.perf_counter() - start) / steps)
    return statistics.median(samples)


def traced(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """The operations of one run: names and milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = Path(folder).glob("**/*.trace.json.gz")
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("ph") == "X" and "hlo_op" in event.get("args", {})]
    return [(event["name"], event["dur"] / 1e3) for event in found]


def kinds(program: str) -> dict[str, str]:
    """Name of each instruction in the text of a program -> what the table calls it."""
    found = [match.groups() for line in program.splitlines() if (match := _INSTRUCTION.match(line))]
    shapes = {name: _LAYOUT.sub("", shape) for name, shape, *_ in found}
    called = {}
    for name, _, opcode, operands, rest in found:
        called[name] = re.sub(r"[.\d]+$", "", name)
        if opcode in ("dot", "custom-call") or "kind=kCustom" in rest:
            of = [shapes.get(operand, "?") for operand in re.findall(r"%([\w.-]+)", operands)]
            called[name] = f"{called[name]}: {' x '.join(of)} to {shapes[name]}"
    return called


def table(operations: list[tuple[str, float]], called: dict[str, str], steps: int, most: int) -> list[str]:
    """Lines of Markdown: the kinds that took most, each with its share of all."""
    times, counts = collections.Counter(), collections.Counter()
    for name, ms in operations:
        kind = called.get(name, name)
        times[kind] += ms
        counts[kind] += 1
    total = sum(times.values())
    lines = ["| operation | runs | ms | share |", "|---|---|---|---|"]

    def add(kind: str, count: int, ms: float) -> None:
        lines.append(f"| {kind} | {_short(count / steps)} | {_short(ms / steps)} | {ms / total:.1%} |")

    for kind, ms in times.most_common(most):
        add(kind, counts[kind], ms)
    if rest := times.most_common()[most:]:
        add(f"{len(rest)} more", sum(counts[kind] for kind, _ in rest), sum(ms for _, ms in rest))
    return lines


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="assets/tiny", help="directory of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--stage", default="decode", choices=STAGES)
    parser.add_argument("--rows", default=1, type=int, help="prompts that run at once, each with its picture")
    parser.add_argument("--most", default=16, type=int, help="kinds of operations that are listed")
    args = parser.parse_args()
    if min(args.rows, args.most) < 1:
        parser.error("rows and most are whole numbers of at least 1")
    try:
        model = pj.load(args.checkpoint, dtype=args.dtype, batch_size=args.rows)
        stage = make_stage(model, args.stage, args.rows)
        ms = milliseconds(stage)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    run, program, steps = stage
    about = machine.describe()
    place = f"{about['cpu']}, jax {about['jax']}"
    print(f"{args.checkpoint}, {args.stage}, rows: {args.rows}: {_short(ms)} ms on {place}\n")
    print("\n".join(table(traced(run), kinds(program), steps, args.most)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
