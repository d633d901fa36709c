"""Load the serving engine: many clients at once against one request at a time and against `generate` in batches.

    python benchmarks/serving.py
    python benchmarks/serving.py --checkpoint DIR --dtype bfloat16 --seconds 180 --scenes 8 --max_new_tokens 24

Captions, answers, boxes and masks about scenes of the evaluation, greedy and sampled, free and constrained, with limits
and prompts of different lengths; all take turns in one process. Each answer under load is compared with the one that
the request got alone. An engine embeds an image once, as long as its cache has it; another one, without a cache, embeds
it for each request, as `generate` does. Then the distributions of the next token are compared, of rows among others and
of the same rows alone. OUT.json holds all numbers, OUT.md the tables; a model that is measured again replaces its own
part only.
"""

import argparse
import dataclasses
import datetime
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paligemma_jax as pj
from benchmarks import machine
from benchmarks.crowd import compare_distributions
from paligemma_jax.config import variant_name
from paligemma_jax.errors import UserError
from paligemma_jax.serving.engine import Engine, EngineSettings
from paligemma_jax.serving.events import Finished, Piece
from paligemma_jax.shapes_world.questions import sample_question
from paligemma_jax.shapes_world.samples import scene_sample

ROOT = Path(__file__).resolve().parents[1]
_SEED = 20_000_000  # of the evaluation's scenes
_TASKS = ("caption", "answer", "detect", "segment")
_SAMPLINGS = (
    pj.Sampling(),
    pj.Sampling(temperature=0.8, seed=1),
    pj.Sampling(),
    pj.Sampling(temperature=1.0, top_p=0.9, seed=2),
    pj.Sampling(),
    pj.Sampling(temperature=1.2, top_k=20, min_p=0.05, seed=3),
)
BATCH = 16  # rows of `generate`
ROUNDS = 3
_TITLES = {
    "alone": "one request at a time",
    "batches": f"`generate`, batches of {BATCH}",
    "served": "served",
    "without": "served, each image embedded anew",
}
_HEADER = """# Serving

Requests with different tasks, lengths and sampling on one engine, beside the same requests one at a time and in batches
of `generate`, which take turns with it in one process. "Same" is the share of answers under load whose tokens are those
of the request alone. Time to the first token counts from `submit`, and waiting for a slot with it; between tokens is
the time between two pieces that a client hears, over the tokens of the later one. KL is that of the distributions of
the next token among other rows from those of the same rows alone, the largest of all.
"""


def make_requests(num_scenes: int, max_new_tokens: int) -> list[pj.Request]:
    """One request of each task about each scene."""
    found = []
    for index in range(num_scenes):
        sample = scene_sample(_SEED, index)
        rng, left = np.random.default_rng((_SEED, index, 3)), np.array([box[0] for box in sample.boxes])
        for number, task in enumerate(_TASKS):
            question = sample_question(task, sample.kinds, left, rng)
            turn = index + number
            prompt = question.prefix
            if task == "answer" and index % 4 == 0:  # a longer prompt
                prompt = f"answer en look closely at every shape in this picture and tell me, {prompt[10:]}"
            options = {
                "max_new_tokens": max(1, max_new_tokens // (1 + turn % 3)),
                "sampling": _SAMPLINGS[turn % len(_SAMPLINGS)],
                "constrain": task in ("detect", "segment") and turn % 2 == 0,
            }
            found.append(pj.Request.of(sample.image, prompt, **options))
    return found


@dataclasses.dataclass
class Load:
    """What clients saw.

    first_s: to the first token of each answer.
    gaps_s: between two tokens.
    """

    answers: int = 0
    tokens: int = 0
    same: int = 0
    lost: int = 0
    first_s: list[float] = dataclasses.field(default_factory=list)
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Load") -> None:
        """Count what another one saw too."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def run_clients(
    engine: Engine, requests: list[pj.Request], expected: list[pj.Output], num_clients: int, seconds: float, turn: int
) -> tuple[Load, float]:
    """Clients that ask again and again until the time is over; what they saw, and how long it took."""
    loads = [Load() for _ in range(num_clients)]
    start = time.perf_counter()

    def client(number: int) -> None:
        load, rng = loads[number], np.random.default_rng((turn, number))
        while time.perf_counter() - start < seconds:
            index = int(rng.integers(len(requests)))
            try:
                _ask(engine, requests[index], expected[index], str(number), load)
            except Exception as error:
                load.lost += 1
                load.errors.append(repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = Load()
    for load in loads:
        whole.add(load)
    return whole, time.perf_counter() - start


def _ask(engine: Engine, request: pj.Request, expected: pj.Output, client: str, load: Load) -> None:
    submitted = before = time.perf_counter()
    tokens = []
    for event in engine.submit(request, client=client):
        now = time.perf_counter()
        if isinstance(event, Piece):
            if tokens:
                load.gaps_s += [(now - before) / len(event.tokens)] * len(event.tokens)
            else:
                load.first_s.append(now - submitted)
            before = now
            tokens.append(event.tokens)
    assert isinstance(event, Finished)
    load.answers += 1
    load.tokens += len(event.output.tokens)
    heard = np.concatenate(tokens)
    load.same += np.array_equal(heard, expected.tokens) and event.output.text == expected.text


def repeat(answer: Callable[[int], int], seconds: float, start: int) -> tuple[int, float]:
    """Answers given by answer(0), answer(1), ... until the time is over, from `start` on; and how long it took."""
    begun, count = time.perf_counter(), 0
    for number in itertools.count(start):
        count += answer(number)
        if time.perf_counter() - begun > seconds:
            return count, time.perf_counter() - begun


def in_batches(requests: list[pj.Request]) -> tuple[list[pj.Request], list[list[pj.Request]]]:
    """The requests in a random order, and that order in batches for `generate`."""
    order = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    return order, [order[k : k + BATCH] for k in range(0, len(order) - BATCH + 1, BATCH)]


def rates_of_generate(
    model: pj.PaliGemma, order: list[pj.Request], batches: list[list[pj.Request]], seconds: float, turn: int
) -> tuple[float, float]:
    """Answers per second without a server, for so long each: one request at a time, and in batches."""
    found = []
    for calls, start in (([[request] for request in order], turn * 97), (batches, turn)):
        count, took = repeat(lambda i, calls=calls: len(model.answer(calls[i % len(calls)], BATCH)), seconds, start)
        found.append(count / took)
    return found[0], found[1]


def measure(model: pj.PaliGemma, args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a model; progress on stderr."""
    requests = make_requests(args.scenes, args.max_new_tokens)
    order, batches = in_batches(requests)
    load_average = os.getloadavg()[0]
    note("answering alone")
    expected = [model.answer([request])[0] for request in requests]
    for batch in batches:
        model.answer(batch, batch_size=BATCH)
    settings = EngineSettings(
        args.slots, max(args.clients, 1), args.max_new_tokens, args.max_prompt_tokens, args.max_images
    )
    engine, bare = Engine(model, settings), Engine(model, dataclasses.replace(settings, cache_bytes=0))
    bare._programs = engine._programs
    note("compiling")
    start = time.perf_counter()
    engine.start()
    engine.wait_ready()
    ready_s = time.perf_counter() - start
    bare.start()
    bare.wait_ready()
    for each in (engine, bare):
        run_clients(each, requests, expected, args.clients, 1.0, 1000)  # first runs are slower
    whole, memory, rates = Load(), [], {name: [] for name in _TITLES}
    for turn in range(ROUNDS):
        note(f"round {turn + 1} of {ROUNDS}")
        part = args.seconds / ROUNDS
        alone, batched = rates_of_generate(model, order, batches, part / 3, turn)
        rates["alone"].append(alone)
        rates["batches"].append(batched)
        load, took = run_clients(engine, requests, expected, args.clients, part, turn)
        rates["served"].append(load.answers / took)
        memory.append(_memory_mb())
        load_without, took = run_clients(bare, requests, expected, args.clients, part / 3, turn)
        rates["without"].append(load_without.answers / took)
        whole.add(load)
    stats = engine.stats()
    programs = len(engine._programs)
    kl = compare_distributions(model, engine._programs, requests[: args.slots], settings)
    for each in (engine, bare):
        each.close()
    for error in dict.fromkeys(whole.errors):
        note(error)
    return {
        "load_average": load_average,
        "requests": len(requests),
        "ready_s": ready_s,
        "programs": programs,
        "rates": rates,
        "answers": whole.answers,
        "tokens": whole.tokens,
        "same": whole.same / max(1, whole.answers),
        "lost": whole.lost,
        "compiles": stats.compiles_while_serving,
        "memory_mb": memory,
        "padding": 1 - stats.prompt_tokens / stats.padded_tokens,
        "first_ms": percentiles(whole.first_s),
        "between_ms": percentiles(whole.gaps_s),
        "kl": kl,
    }


def _memory_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": 1e3 * float(np.percentile(seconds, q)) for q in (50, 99)} if seconds else {}


def note(text: str) -> None:
    print(text, file=sys.stderr)


def document(entries: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown: a section for each model."""
    lines = [_HEADER]
    for name, entry in entries.items():
        found = entry["found"]
        memory = ", ".join(f"{value:.0f}" for value in found["memory_mb"])
        lines += [
            *section(name, entry, _TITLES),
            f"| same as alone | {found['same']:.2%} |",
            *load_rows(found),
            f"| memory after each round | {memory} MB |",
            f"| padding of prompts | {found['padding']:.0%} |",
            f"| KL in a crowd, largest of {len(found['kl'])} rows | {max(found['kl']):.1e} |",
            "",
        ]
    return "\n".join(lines)


def section(name: str, entry: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """The lines on one model up to the head of the second table: where it was measured, and the rates."""
    about, settings, found = entry["machine"], entry["settings"], entry["found"]
    mean = {key: float(np.mean(values)) for key, values in found["rates"].items()}
    programs = f" with {found['programs']} programs" if "programs" in found else ""
    lines = [
        f"## {name}",
        "",
        f"{entry['date']}: {about['cpu']}, {about['cores']} cores, python {about['python']}, jax {about['jax']} on "
        f"{entry['device']}. {settings['clients']} clients for {settings['seconds']:g} s, {settings['slots']} slots, "
        f"{found['requests']} different requests of at most {settings['max_new_tokens']} tokens. "
        f"Ready after {found['ready_s']:.1f} s{programs}. "
        f"Load average of the machine before, by other work: {found['load_average']:.1f}.",
        "",
        "| | answers per second, by round | mean | served / this |",
        "|---|---|---|---|",
    ]
    for key, title in titles.items():
        each = ", ".join(map(_rate, found["rates"][key]))
        lines.append(f"| {title} | {each} | {_rate(mean[key])} | {mean['served'] / mean[key]:.2f} |")
    return [*lines, "", "| | |", "|---|---|", f"| answers, tokens | {found['answers']}, {found['tokens']} |"]


def load_rows(found: dict[str, Any]) -> list[str]:
    """Rows of the second table that every load test has."""
    first, between = found["first_ms"], found["between_ms"]
    return [
        f"| lost | {found['lost']} |",
        f"| compiles while serving | {found['compiles']:g} |",
        f"| time to first token, p50 and p99 | {first['p50']:.0f} ms, {first['p99']:.0f} ms |",
        f"| between tokens, p50 and p99 | {between['p50']:.1f} ms, {between['p99']:.1f} ms |",
    ]


def _rate(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def main() -> int:
    args = read_arguments(__doc__, ROOT / "benchmarks/results/serving")
    try:
        name, model = load_model(args)
        machine.keep(args.out, name, entry_of(args, measure(model, args)), document)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_arguments(about: str, out: Path) -> argparse.Namespace:
    """The options of a load test, which writes to `out` unless told otherwise."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--checkpoint", default="assets/tiny", help="directory of the model")
    parser.add_argument("--name", help="what the tables call it; by default its variant, or its directory")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--seconds", default=60.0, type=float, help="under load")
    parser.add_argument("--clients", default=64, type=int)
    parser.add_argument("--slots", default=16, type=int)
    parser.add_argument("--scenes", default=24, type=int, help="four requests each")
    parser.add_argument("--max_new_tokens", default=96, type=int)
    parser.add_argument("--max_prompt_tokens", default=64, type=int)
    parser.add_argument("--max_images", default=1, type=int)
    parser.add_argument("--out", default=out, type=Path)
    args = parser.parse_args()
    if min(args.seconds, args.clients, args.slots, args.max_new_tokens) <= 0 or args.scenes * len(_TASKS) < BATCH:
        parser.error(f"all numbers are above 0, and scenes at least {BATCH // len(_TASKS)}")
    return args


def load_model(args: argparse.Namespace) -> tuple[str, pj.PaliGemma]:
    """The model, and what the tables call it."""
    model = pj.load(args.checkpoint, args.dtype, args.quantization, batch_size=args.slots)
    name = args.name or variant_name(model.config) or Path(args.checkpoint).name
    return f"{name}, {args.quantization or args.dtype}", model


def entry_of(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a load test: what was found, where, and with which settings."""
    names = ("dtype", "quantization", "seconds", "clients", "slots", "scenes", "max_new_tokens")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "device": jax.devices()[0].device_kind,
        "settings": {key: getattr(args, key) for key in names},
        "found": found,
    }


if __name__ == "__main__":
    sys.exit(main())
