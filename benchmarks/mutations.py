"""How much the tests notice: faults that were planted on purpose, one at a time, and what becomes of them.

    python benchmarks/mutations.py                    # all of mutations.toml; an hour on two cores
    python benchmarks/mutations.py --only 'mask|yolo'
    python benchmarks/mutations.py --check            # only that every place is found once, which takes a moment

A fault is a line or two of the package that another text takes the place of, in a copy of the tree, with the tests that
should fail then. These are the smallest that can notice, so that a fault takes seconds; all of them are part of what CI
runs. A fault is killed when they fail, and has survived when they pass. A place that is not there exactly once, tests
that are not found, and a tree that cannot be imported any more are errors of the list: nothing is counted then.

The table goes to benchmarks/results/mutations.md; with --only the other rows stay as they were.
"""

import argparse
import collections
import dataclasses
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "benchmarks" / "mutations.toml"
RESULTS = ROOT / "benchmarks" / "results" / "mutations.md"
COPIED = ("assets", "benchmarks", "configs", "convert", "main.py", "paligemma_jax", "pyproject.toml", "tests")
GOAL = 0.95
TIMEOUT_S = 600
_HEAD = "| fault | kind | file | result | seconds |"


class ListError(Exception):
    """The list of faults does not fit the tree."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    name: what is wrong with it, in a few words.
    kind: of oversight, such as "ignored option"; the report counts by it.
    file: path from the repository's root.
    old, new: a text that the file has exactly once, and what takes its place.
    tests: paths or node ids; any that fails kills it.
    marks: pytest's -m expression; CI runs the slow tests too.
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    marks: str = "not oracle"


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """The list, checked for itself: every field there, no name twice."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    faults = [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    twice = [name for name, count in collections.Counter(fault.name for fault in faults).items() if count > 1]
    if twice:
        raise ListError(f"two faults are called {', '.join(twice)}: give each a name of its own")
    return faults


def planted(text: str, fault: Fault) -> str:
    """The file's text with the fault in it; ListError unless there is exactly one place for it."""
    if (count := text.count(fault.old)) != 1:
        raise ListError(f"{fault.name}: {fault.file} has the text {count} times, not once:\n{fault.old}")
    if fault.old == fault.new:
        raise ListError(f"{fault.name}: old and new are the same")
    return text.replace(fault.old, fault.new)


def check(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """What is wrong with the places and the tests of a list, one line or more for each fault that has moved."""
    problems = []
    for fault in faults:
        try:
            planted((root / fault.file).read_text(encoding="utf-8"), fault)
        except FileNotFoundError:
            problems.append(f"{fault.name}: {fault.file} is not there")
        except ListError as error:
            problems.append(str(error))
        for test in fault.tests:
            path, _, function = test.partition("::")
            function = function.partition("[")[0]
            file = root / path
            if not file.is_file() or (function and f"def {function}(" not in file.read_text(encoding="utf-8")):
                problems.append(f"{fault.name}: there is no test {test}")
    return problems


def import_libraries() -> None:
    """Import what all tests do, the package excepted: every fault's process starts as a copy of this one."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("jax", "flax.linen", "optax", "ml_collections", "sentencepiece", "PIL.Image", "pytest"):
        importlib.import_module(name)


def run_tests(root: Path, tests: Sequence[str], marks: str) -> int:
    """pytest's exit status, 0 or 1; 1 also when it ran too long.

    It runs in a copy of this process. Programs that no fault is in are compiled once for all, into the tree.
    """
    log = root / "log.txt"
    sys.stdout.flush()
    if not (process := os.fork()):
        _run_here(root, tests, marks, log)
    end = time.monotonic() + TIMEOUT_S
    while not (done := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return 1
        time.sleep(0.1)
    status = os.waitstatus_to_exitcode(done[1])
    if status not in (0, 1):
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise ListError(f"pytest ended with {status}, neither passed nor failed:\n{tail}")
    return status


def _run_here(root: Path, tests: Sequence[str], marks: str, log: Path) -> NoReturn:
    """Run pytest in this process, and end it."""
    status = 3  # pytest's own number for an internal error
    try:
        with log.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.chdir(root)
        ours = (ROOT, ROOT / "benchmarks")
        sys.path[:] = [str(root), *(path for path in sys.path if Path(path).resolve() not in ours)]
        os.environ["PALIGEMMA_TEST_CACHE"] = str(root / "compiled")
        import pytest

        status = int(pytest.main(["-x", "-q", "-n", "0", "-m", marks, "-p", "no:cacheprovider", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_fault(root: Path, fault: Fault) -> tuple[str, float]:
    """Plant a fault in a copy of the tree, see what the tests say, and take it out: killed or survived, and seconds."""
    path = root / fault.file
    plain = path.read_text(encoding="utf-8")
    start = time.perf_counter()
    _replace(path, planted(plain, fault))
    try:
        status = run_tests(root, fault.tests, fault.marks)
    except ListError as error:
        raise ListError(f"{fault.name}: {error}") from None
    finally:
        _replace(path, plain)
    return "killed" if status else "SURVIVED", time.perf_counter() - start


def _replace(path: Path, text: str) -> None:
    """Write a module without what Python has compiled of it: its age is told in whole seconds."""
    path.write_text(text, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def copy_tree(target: Path) -> None:
    """What the tests need, without what others leave beside it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        else:
            shutil.copy(source, target / name)


def read_rows(path: Path = RESULTS) -> dict[str, tuple[str, float]]:
    """Results of an earlier run by the faults' names."""
    if not path.exists():
        return {}
    cells = [line.strip("| ").split(" | ") for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in cells if len(row) == 5 and re.fullmatch(r"[\d.]+", row[4])]
    return {name: (result, float(seconds)) for name, _, _, result, seconds in rows}


def report(faults: Sequence[Fault], results: dict[str, tuple[str, float]]) -> str:
    """The page: score, by kind, and every fault."""
    ran = [fault for fault in faults if fault.name in results]
    killed = [fault for fault in ran if results[fault.name][0] == "killed"]
    score = len(killed) / max(1, len(ran))
    lines = ["# Planted faults", "", "Written by `python benchmarks/mutations.py`.", ""]
    lines += [f"{len(killed)} of {len(ran)} killed: {score:.3f} (the goal is {GOAL}).", ""]
    lines += ["| kind | killed | of |", "|---|---|---|"]
    of_kind, killed_of_kind = (collections.Counter(fault.kind for fault in some) for some in (ran, killed))
    lines += [f"| {kind} | {killed_of_kind[kind]} | {count} |" for kind, count in sorted(of_kind.items())]
    lines += ["", _HEAD, "|---|---|---|---|---|"]
    for fault in ran:
        result, seconds = results[fault.name]
        lines.append(f"| {fault.name} | {fault.kind} | {fault.file} | {result} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when the list does not fit, or when the score is below the goal."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose name, kind or file has this")
    parser.add_argument("--check", action="store_true", help="look for the places and tests only")
    parser.add_argument("--skip-plain", action="store_true", help="do not run the tests without any fault first")
    options = parser.parse_args(arguments)
    faults = read_faults()
    chosen = [f for f in faults if re.search(options.only, f"{f.name}\n{f.kind}\n{f.file}")]
    if problems := check(faults if options.check else chosen):
        print("\n".join([*problems, f"{len(problems)} problems"]), file=sys.stderr)
        return 1
    if options.check:
        print(f"{len(faults)} faults, each with its place and its tests")
        return 0
    results = {name: row for name, row in read_rows().items() if name in {fault.name for fault in faults}}
    import_libraries()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve()
        copy_tree(root)
        for marks in sorted({fault.marks for fault in chosen} if not options.skip_plain else ()):
            tests = sorted({test for fault in chosen if fault.marks == marks for test in fault.tests})
            if run_tests(root, tests, marks):
                print("the tests fail without any fault: mend them first", file=sys.stderr)
                return 1
        for i, fault in enumerate(chosen, 1):
            results[fault.name] = run_fault(root, fault)
            result, seconds = results[fault.name]
            print(f"{i}/{len(chosen)}  {result:<8}  {seconds:6.1f} s  {fault.kind}: {fault.name}", flush=True)
            RESULTS.write_text(report(faults, results), encoding="utf-8")
    killed = sum(result == "killed" for result, _ in results.values())
    print(f"{killed} of {len(results)} killed: {killed / len(results):.3f}")
    return 0 if killed >= GOAL * len(results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ListError as error:
        sys.exit(f"error: {error}")
