"""Measure how long a query takes among many indexed pictures, exactly and by faiss, and what faiss misses.

    python benchmarks/patch_vit_search.py

The embeddings are drawn at random: all directions alike, which is the worst case for inverted lists, and in groups, as
pictures of the same things are. Queries lie near some of them. OUT.md has the table.
"""

import argparse
import datetime
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from paligemma_jax.files import write_text
from paligemma_jax.patch_vit import index as indexes
from paligemma_jax.patch_vit import ranking

ROOT = Path(__file__).resolve().parents[1]
_WIDTH, _TOP, _GROUP = 512, 5, 1000
_HEADER = """# Search

A query is a vector among unit vectors of 512 numbers; the time is that of one ranking of the best 5, one query after
the other, after loading. `exact` is a dot product with each and a partial sort, `flat` and `ivf` are faiss, ivf with as
many lists as the square root of the number of vectors. Recall is the share of the exact best 5 that is found. "Random"
are directions drawn alike, "groups" lie near one of a centre for 1,000 vectors. Other programs ran on the machine at
the same time: the slowest query says more about them; threads that wait for each other, as in flat, suffer most.

"""


def vectors(count: int, grouped: bool) -> np.ndarray:
    """Unit vectors f32 [N, D]."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((count, _WIDTH), np.float32)
    if grouped:
        centres = rng.standard_normal((max(count // _GROUP, 1), _WIDTH), np.float32)
        for start in range(0, count, _GROUP):
            found[start : start + _GROUP] *= 0.7
            found[start : start + _GROUP] += centres[start // _GROUP % len(centres)]
    for start in range(0, count, 2**16):
        part = found[start : start + 2**16]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return found


def queries(found: np.ndarray, count: int) -> np.ndarray:
    """Vectors f32 [Q, D] near some of `found`, not normalized, as those of texts."""
    rng = np.random.default_rng(1)
    near = found[rng.integers(0, len(found), count)]
    return 8 * (near + 0.03 * rng.standard_normal(near.shape, np.float32))


def timed(rank: ranking.Ranker, asked: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Rows [Q, k], and milliseconds of each query."""
    rank(asked[:1], _TOP)
    rows, times = [], []
    for query in asked:
        started = time.perf_counter()
        rows.append(rank(query[None], _TOP)[1][0])
        times.append(1000 * (time.perf_counter() - started))
    return np.array(rows), times


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def through_a_file(found: np.ndarray, path: Path) -> tuple[indexes.Index, str]:
    """An index as it is loaded from its file, and a line about that."""
    digest = hashlib.sha256(b"").hexdigest()
    entries = [indexes.Entry(f"/pictures/folder/{i:08}.jpg", digest, 100_000, 10**18 + i) for i in range(len(found))]
    started = time.perf_counter()
    indexes.save(path, indexes.Index("/pictures", {}, entries, found, found))
    saved, size = time.perf_counter() - started, path.stat().st_size
    started = time.perf_counter()
    loaded = indexes.load(path)
    taken = time.perf_counter() - started
    about = f"{size / 1e6:,.0f} MB; saved in {saved:.2f} s, loaded in {taken:.2f} s"
    return loaded, f"An index of {len(found):,} pictures has {about}."


def rows(count: int, num_queries: int, grouped: bool, probes: list[int], note: Callable[[str], None]) -> Iterator[str]:
    """The lines of the table about so many vectors."""
    found = vectors(count, grouped)
    with tempfile.TemporaryDirectory() as folder:
        if not grouped:
            index, about = through_a_file(found, Path(folder) / "index")
            note(about)
            found = index.student
        asked = queries(found, num_queries)
        name = f"{count:,} | {'groups' if grouped else 'random'}"

        def line(kind: str, build_s: float | None, rank: ranking.Ranker, exact: np.ndarray | None) -> tuple[str, Any]:
            best, times = timed(rank, asked)
            share = 1.0 if exact is None else recall(best, exact)
            built = "-" if build_s is None else f"{build_s:.1f}"
            shown = " | ".join(f"{value:.2f}" for value in (min(times), np.median(times), max(times)))
            return f"| {name} | {kind} | {built} | {shown} | {share:.3f} |", best

        text, exact = line("exact", None, ranking.ranker(found), None)
        yield text
        for kind in ("flat", "ivf"):
            started = time.perf_counter()
            index = ranking.to_faiss(found, kind)
            build_s = time.perf_counter() - started
            for number in (p for p in probes if p <= index.nlist) if kind == "ivf" else [0]:
                if number:
                    index.nprobe = number
                shown = f"ivf, {number} of {index.nlist} lists" if number else kind
                yield line(shown, build_s, lambda asked, k, index=index: index.search(asked, k), exact)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", default="10000,1000000", help="numbers of vectors, with commas")
    parser.add_argument("--queries", default=100, type=int)
    parser.add_argument("--probes", default="1,8,32,128", help="numbers of lists that ivf looks into")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/patch_vit_search", type=Path)
    args = parser.parse_args()
    about, notes, lines = machine.describe(), [], []
    for count in map(int, args.counts.split(",")):
        for grouped in (False, True):
            for text in rows(count, args.queries, grouped, list(map(int, args.probes.split(","))), notes.append):
                print(text, flush=True)
                lines.append(text)
    import faiss

    text = _HEADER + "\n".join(
        [
            f"{datetime.date.today().isoformat()}: {about['cpu']}, {about['cores']} cores, "
            f"numpy {np.__version__}, faiss {faiss.__version__}, {args.queries} queries.",
            "",
            *notes,
            "",
            "| pictures | embeddings | ranking | made in, s | query, ms: fastest | median | slowest | recall |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    write_text(args.out.with_suffix(".md"), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
