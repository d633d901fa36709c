"""Times of the kernels that a weight may be multiplied by, measured before anything is traced.

Times are kept beside the compiled programs, by processor and compiler: what is chosen by them is then the same in every
process, which finds its programs compiled. How long a matmul takes per number of the weight depends on its format and
its inputs, not on its outputs, so that one entry serves all weights of a width.

Axes: F outputs, D inputs, G groups of inputs.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from paligemma_jax.errors import UserError
from paligemma_jax.files import read_json, write_json
from paligemma_jax.ops.compilation import compiled
from paligemma_jax.ops.cpu import gemv, matmul
from paligemma_jax.ops.cpu.layout import CpuWeight
from paligemma_jax.ops.target import Target
from paligemma_jax.ops.weights import Int4, Int8, Weight, is_weight

LARGE = 2**20  # numbers in a weight from which on its kernel matters

_TURNS = 5
_REVISION = 12  # of the kernels: raise it when one is written anew, and what is known of the last one is forgotten
_FILE = "autotune.json"  # in the directory of the compilation cache
_MEASURED_BYTES = 2**26  # of the weight that is measured, which hardly any cache holds
_WIDTH = 2048  # inputs of that weight where any will do
_NO_KERNEL = 5.0  # times as long: XLA has no kernel for it, whatever other work there was meanwhile

Seconds = dict[str, float]  # by "kernel/rows"

_known: dict[tuple[str, str], Seconds] = {}  # what this process has measured or read, by machine and entry


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the time per number of a weight depends on.

    format: name of its dtype, or "int8", "uint8" (with a zero point) or "int4".
    width: D, with padding.
    num_groups: G of 4 bits.
    """

    format: str
    width: int
    num_groups: int = 0

    def __str__(self) -> str:
        return f"{self.format} of {self.width} inputs" + f" in {self.num_groups} groups" * (self.num_groups > 0)

    @property
    def row_bytes(self) -> int:
        return self.width // 2 if self.format == "int4" else self.width * jnp.dtype(self.format).itemsize

    @property
    def num_outputs(self) -> int:
        """F of the weight that is measured: a round number, as those of networks are."""
        return max(1, _MEASURED_BYTES // self.row_bytes // 64) * 64

    def candidates(self) -> list[tuple[str, int]]:
        """Kernels and numbers of rows to measure."""
        if self.format in ("int8", "uint8", "int4"):
            dot = "tiles" if self.format == "int4" else "dot"
            return [(dot, 1), (dot, gemv.MOST_ROWS), ("gemv", 1), ("gemv", gemv.MOST_ROWS)]
        orders = [("x_first", gemv.MOST_ROWS), *((name, matmul.ROWS_AT_ONCE) for name in ("x_first", "weight_first"))]
        # A single row of float32 is fast in XLA's own kernel.
        return orders + [("gemv", rows) for rows in (1, gemv.MOST_ROWS) if self.format != "float32"]


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured: seconds of each kernel, by spec.

    To override what `prepare` chooses, pass it a table with other times.
    """

    entries: Mapping[str, Seconds] = dataclasses.field(default_factory=dict)

    @property
    def unsigned(self) -> bool:
        """Whether XLA multiplies unsigned 8-bit weights fast, as with dot-product instructions (VNNI)."""
        found = self.entries.get(_ZERO_POINT, {})
        return bool(found) and found["uint8"] < _NO_KERNEL * found["int8"]

    def of(self, spec: Spec) -> Seconds:
        """Seconds by "kernel/rows" for a weight as measured; empty where nothing was."""
        return self.entries.get(str(spec), {})

    def best(self, spec: Spec, num_rows: int) -> float | None:
        """Least seconds per number of a weight for so many rows; None where that is not known."""
        nearest: dict[str, tuple[int, float]] = {}  # of each kernel, the fewest rows that are enough
        for label, seconds in self.of(spec).items():
            kernel, rows = label.split("/")
            if num_rows <= int(rows):
                nearest[kernel] = min(nearest.get(kernel, (int(rows), seconds)), (int(rows), seconds))
        least = min((seconds for _, seconds in nearest.values()), default=None)
        return least and least / (spec.width * spec.num_outputs)

    def __str__(self) -> str:
        def line(name: str) -> str:
            return f"{name}: " + ", ".join(f"{label} {1e3 * x:.3g} ms" for label, x in self.entries[name].items())

        return "\n".join(map(line, sorted(self.entries)))


_ZERO_POINT = "zero point of 8-bit weights"


def spec_of(weight: Weight, unsigned: bool, padding: int = 0) -> Spec:
    """The spec of a weight [F, D], an array or its shape, whose 8-bit numbers will have a zero point or not."""
    if (form := getattr(weight, "quantization", None)) == "int4":
        return Spec("int4", weight.shape[1], weight.group_scale.shape[1])
    if form == "int8":
        return Spec("uint8" if unsigned else "int8", weight.shape[1])
    return Spec(jnp.dtype(weight.dtype).name, weight.shape[1] + padding)


def is_measured(weight: Weight) -> bool:
    """Whether the kernel of a weight, an array or its shape, is a matter of time."""
    if len(weight.shape) != 2 or weight.size < LARGE:
        return False
    return getattr(weight, "quantize_activations", None) or jnp.issubdtype(jnp.dtype(weight.dtype), jnp.floating)


def autotune(params: Any, target: Target, padding: Callable[[Weight], int] = lambda weight: 0) -> Table:
    """Measure what `prepare` will ask about the weights of a tree, which may be shapes: now, while nothing else runs.

    Args:
      params: a parameter tree.
      target: nothing is measured off the CPU, where the reference is what runs.
      padding: numbers after each row of a weight that are to be tried too.
    """
    if target.platform != "cpu":
        return Table()
    weights = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_weight) if is_measured(leaf)]
    entries: dict[str, Seconds] = {}
    if any(hasattr(weight, "quantization") for weight in weights):
        entries[_ZERO_POINT] = _remembered(_ZERO_POINT, ["int8", "uint8"], _zero_point_calls, target)
    unsigned = Table(entries).unsigned
    for weight in weights:
        for spec in (spec_of(weight, unsigned, more) for more in sorted({0, padding(weight)})):
            if str(spec) not in entries:
                labels = [f"{kernel}/{rows}" for kernel, rows in spec.candidates()]
                entries[str(spec)] = _remembered(str(spec), labels, lambda: _calls(spec, unsigned), target)  # noqa: B023
    return Table(entries)


def relative_cost(params: Any, num_rows: int, table: Table) -> float | None:
    """How much longer the matmuls of a network take for so many rows than for one, by what was measured.

    None where that is not known: off the CPU, and where a weight was not measured or not with so many rows.
    """
    one = several = 0.0
    for leaf in jax.tree.leaves(params, is_leaf=is_weight):
        if len(leaf.shape) != 2 or leaf.size < LARGE:
            continue
        spec = spec_of(leaf, table.unsigned, getattr(leaf, "padding", 0))
        costs = table.best(spec, 1), table.best(spec, num_rows)
        if None in costs or spec.format == "float32":  # which no kernel for one row was measured of
            return None
        one, several = one + costs[0] * leaf.size, several + costs[1] * leaf.size
    return several / one if one else None


Call = tuple[Callable[..., jax.Array], *tuple[Any, ...]]  # a function and its operands, arrays or trees of them


def _calls(spec: Spec, unsigned: bool) -> list[Call]:
    return [_call(spec, kernel, rows, unsigned) for kernel, rows in spec.candidates()]


def _call(spec: Spec, kernel: str, rows: int, unsigned: bool) -> Call:
    shape, scale, dtype = (spec.num_outputs, spec.width), jnp.ones(spec.num_outputs), jnp.dtype(jnp.bfloat16)
    if spec.format not in ("int4", "int8", "uint8"):
        weight = CpuWeight(jnp.zeros(shape, spec.format), spec.width, ((None, kernel),))
        return lambda x, weight: weight.matmul(x), jnp.zeros((rows, spec.width), spec.format), weight
    if spec.format == "int4":
        name = "tiles_unsigned" if kernel == "tiles" and unsigned else kernel
        values, group_scale = jnp.zeros((shape[0], shape[1] // 2), jnp.uint8), (shape[0], spec.num_groups)
        weight = Int4(values, scale, jnp.zeros(group_scale, jnp.int8), dtype, ((None, name),))
    else:
        weight = Int8(jnp.zeros(shape, spec.format), scale, dtype, kernels=((None, kernel),))
    return lambda x, weight: weight.integer_matmul(x), jnp.zeros((rows, spec.width), jnp.int8), weight


def _zero_point_calls() -> list[Call]:
    spec = Spec("int8", _WIDTH)
    x, shape = jnp.zeros((gemv.MOST_ROWS, _WIDTH), jnp.int8), (spec.num_outputs, _WIDTH)
    return [(matmul.int8_matmul, x, jnp.zeros(shape, dtype)) for dtype in (jnp.int8, jnp.uint8)]


def _remembered(name: str, labels: list[str], calls: Callable[[], list[Call]], target: Target) -> Seconds:
    """The seconds of each call, from an earlier process on such a machine if it kept them."""
    machine = f"jaxlib {target.jaxlib}, {target.cores} cores {target.processor}, {_REVISION}"
    if (machine, name) in _known:
        return _known[machine, name]
    directory = jax.config.jax_compilation_cache_dir
    path = Path(directory) / _FILE if directory and "://" not in directory else None
    found = _read(path).get(f"{name}, {machine}", {}) if path else {}
    if set(found) != set(labels):
        found = dict(zip(labels, _seconds(calls(), target), strict=True))
        if path:
            known = _read(path) | {
                f"{name}, {machine}": found
            }  # read again: another process may have written meanwhile
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, known)
            except OSError:  # a read-only cache is none
                pass
    _known[machine, name] = found
    return found


def _seconds(calls: Iterable[Call], target: Target) -> list[float]:
    """The least time of each call when they take turns."""
    programs = [(compiled(target, jax.jit(function), *operands), operands) for function, *operands in calls]
    least = [float("inf")] * len(programs)
    for _ in range(_TURNS):
        for i, (program, operands) in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def _read(path: Path) -> dict[str, Seconds]:
    try:
        found = read_json(path)
    except (UserError, OSError):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, dict) and all(isinstance(x, float) for x in value.values())
    }
