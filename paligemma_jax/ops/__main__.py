"""Print which kernel multiplies each weight of a checkpoint on this machine, and what was measured.

    python -m paligemma_jax.ops CHECKPOINT [--rows 16] [--quantization int8]

Headers of files are read, no weights. Times are in ms, of a matmul with that many rows ("kernel/rows").
"""

import argparse
import importlib
import re
import sys
from collections import Counter
from typing import Any

import jax

from paligemma_jax import ops
from paligemma_jax.errors import UserError
from paligemma_jax.ops.autotune import is_measured, spec_of


def describe(params: Any, target: ops.Target, table: ops.Table) -> list[str]:
    """A line for each group of weights that differ in their layer only."""
    flat = jax.tree_util.tree_leaves_with_path(ops.prepare(params, target, table), is_leaf=ops.is_weight)
    groups: Counter[str] = Counter()
    for path, leaf in flat:
        if len(leaf.shape) == 2:
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/weight")
            kind = repr(leaf) if ops.is_weight(leaf) else f"array({list(leaf.shape)}, {leaf.dtype}, reference)"
            groups[f"{re.sub(r'layers_[0-9]+', 'layers_*', name)}: {kind}{_times(leaf, table)}"] += 1
    return [f"{count:3} x {line}" for line, count in groups.items()]


def _times(leaf: ops.Weight, table: ops.Table) -> str:
    spec = spec_of(leaf, table.unsigned, getattr(leaf, "padding", 0))
    scale = leaf.size / (spec.width * spec.num_outputs)
    found = table.of(spec) if is_measured(leaf) else {}
    return "".join(f"; {label} {1e3 * scale * seconds:.3g}" for label, seconds in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m paligemma_jax.ops", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="directory, .npz file or hub id")
    parser.add_argument("--rows", type=int, default=1, help="sequences that are decoded at once")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=ops.FORMATS)
    args = parser.parse_args()
    checkpoints = importlib.import_module("paligemma_jax.checkpoints")  # above ops, which never imports it
    try:
        contents = checkpoints.scan(checkpoints.locate(args.checkpoint))
        params = checkpoints.abstract(contents, args.dtype, args.quantization)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    target = ops.Target.detect(args.rows)
    print(f"{target.platform}, {target.cores} cores, jaxlib {target.jaxlib}, {target.num_rows} rows")
    print("\n".join(describe(params, target, ops.tune(params, target))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
