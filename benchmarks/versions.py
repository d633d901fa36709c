"""Two checkouts of this repository side by side: start, first token, decode steps and memory, process by process.

    python benchmarks/versions.py OLD NEW --checkpoint bf16=DIR --checkpoint int8=OLD_DIR,NEW_DIR --name paligemma-3b

Processes of both take turns, each with the package of its own checkout. Programs that an earlier one has compiled are
on disk; the first start is reported apart. A step of many rows is timed on a state of zeros, which costs what any other
does, so that no prefill of all of them is waited for.
"""

import argparse
import dataclasses
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_NEW_TOKENS = 17
_STEPS = 8  # of a call of decode
_TURNS = 5
_PROMPT = "answer en what is in the picture?"
_MEASURES = {  # name: what the table calls it
    "start_s": "process start to first token, s",
    "first_token_ms": "image to first token, ms",
    "step_ms": "decode step, ms",
    "peak_gb": "peak memory, GB",
}


def work(job: dict[str, Any]) -> dict[str, float]:
    """Measure one checkpoint in this process."""
    import numpy as np

    sys.path.insert(0, job["checkout"])
    from ml_collections import ConfigDict

    import paligemma_jax as pj
    from paligemma_jax.runs import environment

    environment.collect_garbage_seldom()
    environment.select_platform(ConfigDict({"platform": "cpu"}))
    getattr(environment, "enable_compilation_cache", lambda: None)()  # later checkouts do it when they load
    engine = _Engine(pj) if hasattr(pj, "Request") else _Generation(pj)
    if job["rows"] > 1:
        model = pj.load(job["checkpoint"], job["dtype"], batch_size=job["rows"])
        step = engine.step(model, job["rows"])
        step()
        return {"step_ms": min(step() for _ in range(_TURNS)), "peak_gb": _peak_gb()}
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    model = engine.load(job["checkpoint"], job["dtype"], image)
    engine.answer(model, image, 1)
    found = {"start_s": time.time() - job["started"]}
    if job["only_start"]:
        return found
    first = engine.answer(model, image, 1)[0]
    steps = [engine.answer(model, image, _NEW_TOKENS)[1] for _ in range(2)]
    return found | {"first_token_ms": 1e3 * first, "step_ms": min(steps), "peak_gb": _peak_gb()}


class _Engine:
    """How to ask checkouts that have `paligemma_jax.engine`."""

    def __init__(self, pj: Any):
        self._pj = pj

    def load(self, checkpoint: str, dtype: str, image: Any) -> Any:
        return self._pj.load(checkpoint, dtype, warm_up=[self._pj.Request.of(image, _PROMPT, max_new_tokens=1)])

    def answer(self, model: Any, image: Any, count: int) -> tuple[float, float | None]:
        options = self._pj.GenerateOptions(count, min_new_tokens=count if count > 1 else 0)
        return _timed(lambda: model.generate(image, _PROMPT, options=options))

    def step(self, model: Any, rows: int) -> Any:
        import jax
        import jax.numpy as jnp

        from benchmarks.groups import make_group
        from paligemma_jax import ops

        vision, width = model.config.vision, model.config.text.width
        images = [_blank(vision.image_size)] * rows
        soft_tokens = jnp.zeros((1, vision.num_tokens, width), jnp.bfloat16)  # the image encoder stays on disk
        _, group = make_group(model, images, [_PROMPT] * rows, self._pj.GenerateOptions(32), soft_tokens)
        strategy = group.strategy
        arguments = model.params, group.inputs, group.options
        shapes = jax.eval_shape(lambda *args: strategy.prefill(*args, **strategy.prefill_static), *arguments)
        state = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if x.dtype != group.options.key.dtype else None, shapes
        )
        options = dataclasses.replace(state.options, key=group.options.key, limit=jnp.full(rows, 10**6))
        states = [dataclasses.replace(state, options=options, prefix_length=group.inputs.prefix_length)]
        static = strategy.decode_static | {"num_steps": _STEPS}
        program = ops.compiled(model.runner.target, strategy.decode, model.params, states[0], **static)

        def step() -> float:
            start = time.perf_counter()
            states.append(jax.block_until_ready(program(model.params, states.pop())))
            return 1e3 * (time.perf_counter() - start) / _STEPS

        return step


class _Generation:
    """The same for those before, which have `paligemma_jax.generation`; to be deleted when none is compared again."""

    def __init__(self, pj: Any):
        self._pj = pj

    def load(self, checkpoint: str, dtype: str, image: Any) -> Any:
        def prepare(model: Any) -> None:
            model.config = dataclasses.replace(model.config, eos_token_id=-1)
            model.compile([[0]], _PROMPT, 1)

        return self._pj.load(checkpoint, dtype, prepare=prepare)

    def answer(self, model: Any, image: Any, count: int) -> tuple[float, float | None]:
        return _timed(lambda: model.generate(image, _PROMPT, count))

    def step(self, model: Any, rows: int) -> Any:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from paligemma_jax.compiling import compiled
        from paligemma_jax.generation import cache, engine
        from paligemma_jax.generation.sampling import row_keys

        config, size = model.config, model.config.vision.image_size
        batch = model.processor([_blank(size)] * rows, [_PROMPT] * rows)
        soft = jnp.zeros((rows, config.vision.num_tokens, config.text.width), jnp.bfloat16)
        inputs, keys = engine.prepare(batch, soft, range(rows)), row_keys(0, range(rows))
        rule = dataclasses.replace(self._pj.Sampling().rule(), loc_start=np.int32(model.processor.tokenizer.loc_start))
        static = {"config": config, "num_slots": cache.num_slots(inputs.tokens.shape[1], 32)}
        shapes = jax.eval_shape(lambda *args: engine.prefill(*args, **static), model.params, inputs, keys, rule)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if x.dtype != keys.dtype else None, shapes)
        states = [dataclasses.replace(state, keys=keys, step=jnp.int32(1), prefix_length=inputs.prefix_length)]
        program = compiled(engine.decode, model.params, states[0], rule, config=config, num_steps=_STEPS)

        def step() -> float:
            start = time.perf_counter()
            state, _ = jax.block_until_ready(program(model.params, states.pop(), rule))
            states.append(state)
            return 1e3 * (time.perf_counter() - start) / _STEPS

        return step


def _blank(size: int) -> Any:
    import numpy as np

    return np.zeros((size, size, 3), np.uint8)


def _timed(run: Any) -> tuple[float, float | None]:
    start = time.perf_counter()
    [output] = run()
    seconds = time.perf_counter() - start - output.timing.compile_s
    return seconds, output.timing.decode_ms_per_token


def _peak_gb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run(checkout: Path, cache: Path, job: dict[str, Any]) -> dict[str, float]:
    """One process of a checkout."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TF_CPP_MIN_LOG_LEVEL": "3"}
    job = job | {"checkout": str(checkout), "started": time.time()}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout} failed with {job}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(checkouts: list[Path], caches: list[Path], paths: list[str], dtype: str, rows: int, rounds: int) -> dict:
    """Samples of each measure, a list for each checkout; the first start of each is apart."""
    found: dict[str, list[list[float]]] = {}
    common = {"dtype": dtype, "rows": rows, "only_start": False}
    for turn in range(rounds + 1):
        for side in (0, 1) if turn % 2 else (1, 0):
            job = common | {"checkpoint": paths[side], "only_start": turn == 0 and rows == 1}
            for name, value in run(checkouts[side], caches[side], job).items():
                name = f"first {name}" if turn == 0 else name
                found.setdefault(name, [[], []])[side].append(value)
    return found


def document(name: str, about: str, rows: list[tuple[str, list[list[float]]]]) -> str:
    """A table: medians of both, their ratio, and the spread of the old one against itself."""
    lines = [f"## {name}", "", about, "", "| | old | new | new / old | old / old |", "|---|---|---|---|---|"]
    for label, (old, new) in rows:
        first, second = statistics.median(old), statistics.median(new)
        spread = f"{max(old) / min(old):.2f}" if len(old) > 1 else "-"
        lines.append(f"| {label} | {first:.4g} | {second:.4g} | {second / first:.2f} | {spread} |")
    return "\n".join([*lines, ""])


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout, as git worktree makes it")
    parser.add_argument("new", type=Path)
    parser.add_argument("--checkpoint", action="append", required=True, help="LABEL=DIR, or LABEL=OLD_DIR,NEW_DIR")
    parser.add_argument("--name", required=True, help="heading of the table")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/versions.md", help="is appended to")
    args = parser.parse_args()
    checkouts = [args.old.resolve(), args.new.resolve()]
    lines: list[tuple[str, list[list[float]]]] = []
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / side for side in ("old", "new")]
        for given in args.checkpoint:
            label, _, paths = given.partition("=")
            sides = [str(Path(path).resolve()) for path in (paths.split(",") * 2)[:2]]
            for rows in args.rows:
                found = compare(checkouts, caches, sides, args.dtype, rows, args.rounds)
                which = f"{label}, {rows} row{'s' * (rows > 1)}"
                labels = {"first start_s": f"first {_MEASURES['start_s']}"} | _MEASURES
                new = [(f"{which}: {text}", found[name]) for name, text in labels.items() if name in found]
                lines += new
                for entry in new:
                    print(*entry, file=sys.stderr, flush=True)
    sys.path.insert(0, str(ROOT))
    from benchmarks import machine

    commits = [_commit(checkout) for checkout in checkouts]
    facts = machine.describe()
    about = (
        f"{datetime.date.today().isoformat()}: {facts['cpu']}, {facts['cores']} cores, jax {facts['jax']}; old "
        f"{commits[0]}, new {commits[1]}; {args.rounds} rounds, medians."
    )
    text = document(args.name, about, lines)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
    return 0


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
