"""Measure what a product of few and many rows with one large weight costs in XLA, by dtype and order of operands.

    python benchmarks/products.py

These costs decide which kernels of `paligemma_jax/ops/cpu` there are. Several copies of the weight take turns, so that
none stays in a cache. Prints a Markdown table: medians in ms of one matmul; "our" ones are what `ops.prepare` chooses
for one row; the padded one has zeros after each row, as a model that is loaded for a batch may have. XLA's own matmul
of one row in fewer bits than 32 is left out: it takes a hundred times as long.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from paligemma_jax import ops

_COPIES = 4
_TURNS = 7
_SUMS = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}


def milliseconds(function, rows: jax.Array, weights: list) -> float:
    """Median time of one product."""
    each = jax.jit(lambda rows, weights: [function(rows, weight) for weight in weights])
    run = ops.compiled(ops.Target.detect(), each, rows, weights)
    jax.block_until_ready(run(rows, weights))
    samples = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        jax.block_until_ready(run(rows, weights))
        samples.append(1e3 * (time.perf_counter() - start) / len(weights))
    return statistics.median(samples)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=_SUMS[a.dtype.name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[16384, 2048], help="outputs and inputs of the weight")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 272])
    args = parser.parse_args()
    draw = [jax.random.normal(jax.random.key(i), args.shape) for i in range(_COPIES)]
    about = machine.describe()
    print(
        f"Weight {args.shape[0]} x {args.shape[1]} on {about['cpu']}, {about['cores']} cores, jax {about['jax']}; ms\n"
    )
    print("| rows | " + " | ".join(f"{name}, {side} first" for name in _SUMS for side in ("weight", "rows")), end=" | ")
    print("our 16 bits | padded | our 8 bits | our 4 bits |\n" + "|---" * (2 * len(_SUMS) + 5) + "|")

    def prepared(weights: list, num_rows: int = 1) -> list:
        return ops.prepare({"language_model": weights}, ops.Target.detect(num_rows))["language_model"]

    few_bits = [prepared([ops.quantize(weight, name) for weight in draw]) for name in ops.FORMATS]
    for count in args.rows:
        cells = []
        for name in _SUMS:
            weights = [(20 * weight).astype(name) for weight in draw]
            rows = jnp.ones((count, args.shape[1]), name)
            slow = count == 1 and name != "float32"  # by a hundred times
            cells += [None if slow else milliseconds(order, rows, weights) for order in (lambda x, w: _dot(w, x), _dot)]
        rows = jnp.ones((count, args.shape[1]), jnp.bfloat16)
        halves = [weight.astype(rows.dtype) for weight in draw]
        plain, padded = prepared(halves), prepared(halves, num_rows=16)
        cells += [milliseconds(ops.linear, rows, weights) for weights in (plain, padded, *few_bits)]
        print(f"| {count} | " + " | ".join("-" if ms is None else f"{ms:.3g}" for ms in cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
