"""Times of small programs, measured once on each kind of processor and remembered beside the compiled programs."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from paligemma_jax.compiling import compiled, processor, uses_wide_loops
from paligemma_jax.errors import UserError
from paligemma_jax.files import read_json, write_json

_TURNS = 5
_SPELLING = 11  # of products: raise it when one is spelt anew, and what is known of the last one is forgotten
_FILE = "products.json"  # in the directory of the compilation cache: seconds, by the name of what was measured

Call = tuple[Callable[..., jax.Array], *tuple[Any, ...]]  # a function and its operands, arrays or trees of them


def remembered(name: str, count: int, calls: Callable[[], list[Call]]) -> list[float]:
    """The seconds of each of `count` calls, from an earlier process on such a processor if it kept them.

    What is chosen by them is then the same in every process, which finds its programs compiled.
    """
    directory = jax.config.jax_compilation_cache_dir
    if not directory or "://" in directory:
        return seconds(calls())
    path, name = Path(directory) / _FILE, f"{name}, {_machine()}"
    known = _read(path)
    if len(known.get(name, ())) != count:
        found = seconds(calls())
        known = _read(path) | {name: found}  # read again: another process may have measured something else meanwhile
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        except OSError:  # a read-only cache is none
            pass
    return known[name]


def seconds(calls: list[Call]) -> list[float]:
    """The least time of each call when they take turns."""
    programs = [(compiled(jax.jit(function), *operands), operands) for function, *operands in calls]
    least = [float("inf")] * len(programs)
    for _ in range(_TURNS):
        for i, (program, operands) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def _read(path: Path) -> dict[str, list[float]]:
    try:
        found = read_json(path)
    except (UserError, OSError):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, list) and all(isinstance(x, float) for x in value)
    }


@functools.cache
def _machine() -> str:
    """The processor, as far as the speed of a program depends on it, the compiler, what it was told, and how we spell
    products."""
    first = processor() or platform.processor()
    kept = [line for line in first.splitlines() if line.startswith(("cpu family", "model", "stepping", "flags"))]
    digest = hashlib.sha256("\n".join(kept or [first, platform.machine()]).encode()).hexdigest()[:12]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loops = "wide" if uses_wide_loops() else "plain"
    return f"jaxlib {importlib.metadata.version('jaxlib')}, {loops} loops, {cores} cores {digest}, {_SPELLING}"
