"""What inference and training take of several chips, compiled for them on a machine that has none.

    pip install "jax[cuda13]" libtpu          # 5 GB, of jax's own version; nothing else needs them
    python benchmarks/scale.py --only 3b,v5e-8           # goes on where it was stopped; see --help
    python benchmarks/scale.py --table                   # results/scale.md from what there is

Each row is a program compiled by XLA's own compiler for the chips, over shapes alone; parameters are those of
PaliGemma 2. *Memory* of a chip is arguments, temporaries and results, less what they share, as the compiler says; a
compiler for TPUs refuses programs that do not fit, and its message has the number. *Collectives* are counted in the
compiled program, with the bytes of their results on a chip. *Limit* is the speed that bandwidth and matrix rate of the
chips allow: the largest of matmul operations by rate and bytes that must be read by bandwidth. It is no measurement:
nothing runs, and neither collectives nor kernels that wait for each other are in it.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accelerators import Program, parse
from benchmarks.chips import MACHINES, devices
from benchmarks.report import head, line
from benchmarks.scale_programs import EXAMPLES_PER_CHIP, PROGRAMS, ROWS, build
from paligemma_jax import ops
from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import UserError, one_line
from paligemma_jax.files import read_json, write_json, write_text
from paligemma_jax.sharding import AXES, Layout, make_mesh, parse_mesh, trace

RESULTS = Path(__file__).parent / "results"
# Without a GPU to try them on, Triton's tiles for some matmuls cannot be chosen; cuBLAS has all.
OPTIONS: dict[str, dict[str, Any]] = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TOO_MUCH = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm|allocat\w+ (\d+) bytes", re.IGNORECASE)
_GOES_ON = ("async-collective-fusion", "async-collective-done")  # parts of one that has started before
_MEMORY = ("argument", "temp", "output", "alias")
_FIRST = (  # in this order, then the others
    ("3b", "224"),
    ("28b", "224", "decode"),
    ("28b", "224", "prompt"),
    ("10b", "224", "lora"),
    ("3b",),
    ("10b", "lora"),
    ("28b", "decode"),
)


def keys() -> list[str]:
    """The names of all rows, "3b 224 v5e-8 decode tensor=8", the most telling first."""
    found = []
    for size in ("3b", "10b", "28b"):
        for pixels in ("224", "448", "896"):
            for machine, chosen in MACHINES.items():
                for program in PROGRAMS:
                    found.append(f"{size} {pixels} {machine} {program} {_mesh(size, program, chosen.num_chips)}")

    def rank(key: str) -> int:
        parts = key.split()
        return next((i for i, wanted in enumerate(_FIRST) if set(wanted) <= set(parts)), len(_FIRST))

    return sorted(found, key=rank)


def _mesh(size: str, program: str, num_chips: int) -> str:
    """What `mesh=auto` gives."""
    model = VARIANTS[f"paligemma2-{size}-224"].text if program in ("prompt", "decode") else None
    sizes = zip(AXES, parse_mesh("auto", num_chips, model), strict=True)
    return ",".join(f"{axis}={n}" for axis, n in sizes if n > 1) or "data=1"


def compile_row(key: str) -> dict[str, Any]:
    """What one row says: sizes, collectives and limits; or what the compiler said against it."""
    size, pixels, machine, program, mesh = key.split()
    chosen, config = MACHINES[machine], VARIANTS[f"paligemma2-{size}-{pixels}"]
    layout = Layout(make_mesh(mesh, devices=list(devices(machine))), config)
    work = build(f"paligemma2-{size}-{pixels}", program, layout, ops.Target(chosen.platform, num_rows=ROWS))
    seconds = max(work.flops / chosen.num_chips / chosen.flops, work.read_bytes / chosen.bandwidth)
    row = {
        **{"unit": work.unit, "count": work.count, "flops": work.flops, "read_bytes": work.read_bytes},
        "limit_per_s": work.count / seconds,
        "limited_by": "bandwidth" if work.read_bytes / chosen.bandwidth == seconds else "matrix rate",
        "notes": layout.notes(work.args),
        "argument": sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in _arrays(work.args)),
    }
    start = time.perf_counter()
    try:
        compiled = trace(layout, work.function, *work.args).lower().compile(OPTIONS[chosen.platform])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = {"needs": _needed(str(error)), "error": one_line(error)[:300]}
        return row | told | {"seconds": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    row |= {name: getattr(memory, f"{name}_size_in_bytes") for name in _MEMORY}
    row["needs"] = row["argument"] + row["temp"] + row["output"] - row["alias"]
    row["seconds"] = time.perf_counter() - start
    row["compiler_flops"] = (compiled.cost_analysis() or {}).get("flops")
    try:
        row["collectives"] = collectives(parse(compiled.as_text()))
    except Exception as error:  # of whatever kind: some programs cannot be printed
        row["collectives"], row["not_printed"] = None, one_line(error)[:200]
    return row


def _arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)]


def _needed(message: str) -> float | None:
    """Bytes that a program needs of a chip, from what the compiler says when it does not fit."""
    match = _TOO_MUCH.search(message)
    if match is None:
        return None
    return float(match[5]) if match[5] else float(match[1]) * {"G": 2**30, "M": 2**20}[match[2].upper()]


def collectives(program: Program) -> dict[str, list[int]]:
    """How many of each collective a program runs, those of a loop once, and the bytes of their results on a chip."""
    found: dict[str, list[int]] = {}

    def count(computation: str) -> None:
        for instruction in program.get(computation, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # What starts one gives its operands too, but for an all-reduce.
                halved = instruction.opcode.endswith("-start") and kind != "all-reduce"
                entry = found.setdefault(kind, [0, 0])
                entry[0] += 1
                entry[1] += instruction.num_bytes // (2 if halved else 1)
            elif instruction.called and not instruction.name.startswith(_GOES_ON):
                count(instruction.called)

    count("ENTRY")
    return found


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown, a section for each machine."""
    lines: list[str] = []
    for machine, chosen in MACHINES.items():
        mine = {key: rows[key] for key in sorted(keys()) if key in rows and key.split()[2] == machine}
        if not mine:
            continue
        title = ["model", "pixels", "program", "mesh", "GB of a chip", "of it arguments", "collectives (MB)", "limit"]
        lines += [f"## {machine}: {chosen.memory / 1e9:.1f} GB a chip", "", *head(title)]
        ordered = sorted(mine, key=lambda key: (_order(key), key))
        lines += [line(_cells(key, mine[key], chosen.memory)) for key in ordered] + [""]
    return lines


def _order(key: str) -> tuple[int, ...]:
    size, pixels, _, program, _ = key.split()
    return int(size[:-1]), int(pixels), PROGRAMS.index(program)


def _cells(key: str, row: dict[str, Any], memory: float) -> list[str]:
    size, pixels, _, program, mesh = key.split()
    needs = row.get("needs")
    fits = needs is not None and needs <= memory and "error" not in row
    used = "does not fit" if needs is None else f"{needs / 1e9:.2f}" + ("" if fits else ", does not fit")
    if "error" in row:
        counted = ""
    elif row["collectives"] is None:
        counted = "not printed"
    else:
        found = sorted(row["collectives"].items())
        counted = ", ".join(f"{n} {kind} ({size / 1e6:.3g})" for kind, (n, size) in found) or "none"
    limit = f"{row['limit_per_s']:.3g} {row['unit']}/s ({row['limited_by']})" if fits else ""
    return [size, pixels, f"{program}, {row['count']} rows", mesh, used, f"{row['argument'] / 1e9:.2f}", counted, limit]


def document(results: dict[str, Any]) -> str:
    """The whole page."""
    rows, missing = results["rows"], len(keys()) - len(results["rows"])
    each = ", ".join(f"{n} at {side} px" for side, n in EXAMPLES_PER_CHIP.items())
    return "\n".join(
        [
            "# Chips and memory for inference and training",
            "",
            f"Compiled without any of the chips; {results['versions']}. Rows of training for each chip: {each}. Speeds "
            "are limits by memory bandwidth and matrix rate, no measurements. What is counted: see scale.py.",
            *([f"{missing} of {len(keys())} rows are not compiled yet."] if missing else []),
            "",
            *table(rows),
        ]
    )


def wanted(only: str) -> Iterator[str]:
    """The rows that have all parts of any of the filters: "3b,v5e-8;28b,decode"."""
    filters = [{part.strip() for part in one.split(",")} for one in only.split(";") if one.strip()] or [set()]
    known = {part for key in keys() for part in key.split()}
    if strange := set().union(*filters) - known:
        raise UserError(f"--only {min(strange)!r} is in no row: use {', '.join(sorted(known))}")
    return (key for key in keys() if any(parts <= set(key.split()) for parts in filters))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="rows with all of these: 3b,v5e-8,decode; more such after ;")
    parser.add_argument("--table", action="store_true", help="write the table from what there is, and compile nothing")
    parser.add_argument("--again", action="store_true", help="compile rows anew that are there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after so many")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.json", help="what was compiled so far")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # of a process of its own: what the compiler takes is freed
    args = parser.parse_args()
    try:
        if args.row:
            os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of the driver, which is not here
            jax.config.update("jax_platforms", "cpu")
            print(json.dumps(compile_row(args.row)))
            return 0
        return _all(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def _all(args: argparse.Namespace) -> int:
    results = read_json(args.results) if args.results.exists() else {"rows": {}}
    start, failed = time.monotonic(), 0
    for key in () if args.table else wanted(args.only):
        if (key in results["rows"] and not args.again) or time.monotonic() - start > 60 * args.minutes:
            continue
        print(key, file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, __file__, "--row", key], capture_output=True, text=True)
        if done.returncode:
            failed += 1
            print(done.stderr[-2000:], file=sys.stderr)
            continue
        results["rows"][key] = json.loads(done.stdout.splitlines()[-1])
        results["versions"] = _versions()
        write_json(args.results, results)
    if results["rows"]:
        write_text(args.results.with_suffix(".md"), document(results))
    return 1 if failed else 0


def _versions() -> str:
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


if __name__ == "__main__":
    sys.exit(main())
