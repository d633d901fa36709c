"""Measure speculation: tokens per pass of the network, passes saved, and time per token with it and without.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --checkpoint DIR --dtype bfloat16 --scenes 1 --max_new_tokens 16 --drafts 3 4 7
    python benchmarks/speculation.py --checkpoint DIR ... --tasks detect

Asks for captions, answers, boxes and masks on the first scenes of the evaluation, one row at a time. With and without
take turns on every prompt, after each was compiled and run once. Tokens are counted after the first one, which prefill
gives. How many passes are saved depends on what a model says, what a pass costs does not: there a large variant with
random weights will do (random_checkpoint.py). OUT.json holds every sample, OUT.md the tables; a model that is measured
again replaces its own part only.
"""

import argparse
import collections
import dataclasses
import datetime
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine
from benchmarks.groups import make_group
from paligemma_jax.config import variant_name
from paligemma_jax.engine.generate import answers
from paligemma_jax.errors import UserError
from paligemma_jax.shapes_world.questions import Question, caption, sample_answer, sample_locate
from paligemma_jax.shapes_world.samples import Sample, scene_sample

ROOT = Path(__file__).resolve().parents[1]
_SEED = 20_000_000  # of the evaluation's scenes
_TASKS = ("caption", "answer", "detect", "segment")
_CHUNK = 2  # passes between two looks at what is done, as the pipeline has it on CPU
_HEADER = """# Speculation

One answer at a time, with `drafts` tokens proposed in each pass of the network; 0 is plain decoding. Tokens are
counted after the first one, which prefill gives. Times are medians over the rounds, with the lowest and the highest in
brackets; "same" is the share of answers whose tokens are those of plain decoding.
"""

Answer = tuple[np.ndarray, np.ndarray]  # tokens and log-probabilities [n], <eos> included


class Asked:
    """A question about an image, ready to be answered again and again."""

    def __init__(self, model: pj.PaliGemma, sample: Sample, question: Question, args: argparse.Namespace):
        options = pj.GenerateOptions(args.max_new_tokens, pj.Sampling(temperature=args.temperature))
        self._groups = {}
        for speculate in (False, True):
            chosen = dataclasses.replace(options, speculate=speculate)
            self._call, self._groups[speculate] = make_group(model, [sample.image], [question.prefix], chosen)

    def answer(self, num_drafts: int, num_steps: int) -> tuple[Answer, int, float]:
        """The answer, the calls of `decode` it took after its first token, and the milliseconds these took."""
        group = self._groups[num_drafts > 0]
        strategy = group.strategy
        size = {"num_drafts": num_drafts} if num_drafts else {}
        strategy = dataclasses.replace(
            strategy,
            prefill_static=strategy.prefill_static | size,
            decode_static=strategy.decode_static | {"num_steps": num_steps},
        )
        growing = answers(self._call, dataclasses.replace(group, strategy=strategy))
        last = next(growing)
        start, calls = time.perf_counter(), 0
        for calls, last in enumerate(growing, 1):  # noqa: B007
            pass
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        count = int(last.step[0])
        return (last.tokens[0, :count], last.scores.logprobs[0, :count]), calls, elapsed_ms


def questions(sample: Sample, index: int) -> list[Question]:
    """What is asked about a scene: both captions, three answers, boxes and masks."""
    rng = np.random.default_rng((_SEED, index))
    left = np.array([box[0] for box in sample.boxes])
    captions = [Question(f"caption {name}", caption(sample.kinds, name), "caption") for name in ("en", "de")]
    answers = [sample_answer(sample.kinds, rng) for _ in range(3)]
    return [*captions, *answers, *(sample_locate(task, sample.kinds, left, rng) for task in ("detect", "segment"))]


def measure(model: pj.PaliGemma, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """For each task a row of numbers for plain decoding and for each number of drafts; progress on stderr."""
    asked: dict[str, list[Asked]] = collections.defaultdict(list)
    for index in range(args.scenes):
        sample = scene_sample(_SEED, index)
        for question in questions(sample, index):
            if question.task in args.tasks:
                asked[question.task].append(Asked(model, sample, question, args))
    columns = [0, *args.drafts]
    total = sum(map(len, asked.values()))
    with tqdm(total=total * (args.repeats + 1), desc="measuring", unit="question") as bar:
        return {task: _measure_task(items, columns, args.repeats, bar) for task, items in asked.items()}


def _measure_task(items: list[Asked], columns: list[int], repeats: int, bar: tqdm) -> list[dict[str, Any]]:
    rows = {column: _Row(column, np.zeros(repeats)) for column in columns}
    for item in items:
        (tokens, logprobs), _, _ = item.answer(0, 1)
        for column, row in rows.items():
            (found, found_logprobs), passes, _ = item.answer(column, 1)  # a pass gives a token, so each chunk is seen
            row.tokens += len(found) - 1
            row.passes += passes
            row.passes_run += _CHUNK * -(-passes // _CHUNK)
            if np.array_equal(found, tokens):
                row.same += 1
                row.difference = max(row.difference, float(np.abs(found_logprobs - logprobs).max()))
            item.answer(column, _CHUNK)
        bar.update()
        for turn in range(repeats):
            for column, row in rows.items():
                row.elapsed_ms[turn] += item.answer(column, _CHUNK)[2]
            bar.update()
    return [row.numbers(len(items)) for row in rows.values()]


@dataclasses.dataclass
class _Row:
    """The sums of one task and number of drafts."""

    drafts: int
    elapsed_ms: np.ndarray  # of each round
    tokens: int = 0
    passes: int = 0
    passes_run: int = 0  # those after the end within a chunk included
    same: int = 0
    difference: float = 0.0

    def numbers(self, answers: int) -> dict[str, Any]:
        return {
            "drafts": self.drafts,
            "answers": answers,
            "tokens_per_answer": self.tokens / answers,
            "passes_per_answer": self.passes / answers,
            "tokens_per_pass": self.tokens / max(1, self.passes),
            "same_answers": self.same / answers,
            "logprob_difference": self.difference,
            "ms_per_token": (self.elapsed_ms / max(1, self.tokens)).tolist(),
            "ms_per_pass": (self.elapsed_ms / max(1, self.passes_run)).tolist(),
        }


def document(entries: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown: a section for each model."""
    lines = [_HEADER]
    for name, entry in entries.items():
        about, settings = entry["machine"], entry["settings"]
        lines += [
            f"## {name}",
            "",
            f"{entry['date']}: {about['cpu']}, {about['cores']} cores, jax {about['jax']} on {entry['device']}. "
            f"{settings['dtype']}, temperature {settings['temperature']}, at most {settings['max_new_tokens']} tokens; "
            f"scenes: {settings['scenes']}, rounds: {settings['repeats']}.",
            "",
            "| task | drafts | tokens | passes | tokens per pass | passes saved | ms per pass | ms per token | same |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(task, row) for task, rows in entry["tasks"].items() for row in rows]
        lines.append("")
    return "\n".join(lines)


def _line(task: str, row: dict[str, Any]) -> str:
    tokens, passes = row["tokens_per_answer"], row["passes_per_answer"]
    saved = 1 - passes / tokens if tokens else 0.0
    counts = f"{tokens:.1f}", f"{passes:.1f}", f"{row['tokens_per_pass']:.2f}", f"{saved:.0%}"
    times = _spread(row["ms_per_pass"]), _spread(row["ms_per_token"])
    return f"| {' | '.join([task, str(row['drafts']), *counts, *times, format(row['same_answers'], '.1%')])} |"


def _spread(values: list[float]) -> str:
    """Median, lowest and highest: "2.31 (2.28-2.40)"."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="assets/tiny", help="directory of the model")
    parser.add_argument("--name", help="what the tables call it; by default its variant, or its directory")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--scenes", default=32, type=int)
    parser.add_argument("--tasks", default=_TASKS, choices=_TASKS, nargs="+", help="what is asked")
    parser.add_argument("--drafts", default=[7], type=int, nargs="+", help="how many; several are compared")
    parser.add_argument("--max_new_tokens", default=128, type=int)
    parser.add_argument("--temperature", default=0.0, type=float)
    parser.add_argument("--repeats", default=3, type=int, help="rounds that are timed")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/speculation", type=Path)
    args = parser.parse_args()
    if min(args.scenes, args.repeats, args.max_new_tokens, *args.drafts) < 1:
        parser.error("scenes, repeats, max_new_tokens and drafts are whole numbers of at least 1")
    try:
        model = pj.load(args.checkpoint, dtype=args.dtype)
        name = args.name or variant_name(model.config) or Path(args.checkpoint).name
        settings = {key: getattr(args, key) for key in ("dtype", "temperature", "max_new_tokens", "scenes", "repeats")}
        entry = {
            "date": datetime.date.today().isoformat(),
            "machine": machine.describe(),
            "device": jax.devices()[0].device_kind,
            "settings": settings,
            "tasks": measure(model, args),
        }
        machine.keep(args.out, f"{name}, {args.dtype}", entry, document)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
