"""Weights made ready for a target, once, when a model is loaded.

Axes: F outputs, D inputs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from paligemma_jax.ops.autotune import LARGE, Seconds, Table, autotune, spec_of
from paligemma_jax.ops.cpu import gemv, layout, matmul
from paligemma_jax.ops.cpu.layout import CpuWeight
from paligemma_jax.ops.kernels import Kernels
from paligemma_jax.ops.target import Target
from paligemma_jax.ops.weights import Weight, is_weight, with_zero_point

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_GEMV_SIZE = 2**18  # numbers in a weight from which on a GEMV is worth starting: for [256, 2048] it takes a third
_VERY_LARGE = 2**23  # numbers in a weight from which on many rows may be slow
_CLEARLY = 1.1  # gain that is no accident
_CLIFF = 3.0  # gain that says that the other way has no fast kernel for many rows
_PADDING_GAIN = 1.2  # that is worth the time and memory of laying a weight out anew
_DECODER = "language_model/"  # its weights are multiplied with few rows; those of the image encoder with many


def prepare(params: Any, target: Target, table: Table | None = None) -> Any:
    """The parameters of a network with the best kernel for each weight, laid out for it.

    On a CPU plain arrays that are multiplied become `CpuWeight`; elsewhere projections of one input are fused. The tree
    may hold shapes (`jax.ShapeDtypeStruct`): the result has the same structure, so that programs can be compiled for it
    before the weights are there.

    Args:
      params: nested dictionaries of weights.
      target: what programs will be compiled for.
      table: of `autotune`, which is called if there is none.
    """
    table = tune(params, target) if table is None else table

    def leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        return prepare_leaf("/".join(str(getattr(part, "key", part)) for part in path), leaf, target, table)

    params = jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_weight)
    return params if target.platform == "cpu" else _map_modules(params, _fuse)


def tune(params: Any, target: Target) -> Table:
    """The table that `prepare` needs for the weights of a network, which may be shapes."""
    return autotune(params[_DECODER[:-1]], target, lambda weight: _padding(weight, target))


def prepare_leaf(path: str, leaf: Any, target: Target, table: Table) -> Any:
    """One parameter of `prepare`, by its path "a/b/weight"; fusing apart, which takes several.

    What is prepared already stays as it is: `unprepare` it first.
    """
    if len(leaf.shape) != 2 or not path.startswith(_DECODER) or getattr(leaf, "kernels", ()):
        return leaf
    if target.platform != "cpu":
        return _with_values(leaf, jnp.int8) if getattr(leaf, "quantization", "") == "int8" else leaf
    if getattr(leaf, "quantization", None) == "int8" and leaf.quantize_activations:
        leaf = _with_values(leaf, jnp.uint8 if table.unsigned else jnp.int8)
    if hasattr(leaf, "quantization"):
        return dataclasses.replace(leaf, kernels=_integer_kernels(leaf, table))
    if not jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating):
        return leaf
    more = _padding(leaf, target)
    if more:
        plain, padded = (table.best(spec_of(leaf, False, count), target.num_rows) for count in (0, more))
        more = more if plain and padded and plain > _PADDING_GAIN * padded else 0
    kernels = _float_kernels(leaf, table.of(spec_of(leaf, False, more)))
    values = _applied(functools.partial(_pad, count=more), leaf) if more else leaf
    return CpuWeight(values, leaf.shape[1], kernels) if kernels else leaf


def unprepare(params: Any) -> Any:
    """The parameters as they were before `prepare`: one plain array or quantized weight for each name of a file."""
    return _map_modules(jax.tree.map(_plain, params, is_leaf=is_weight), _split)


def _plain(leaf: Any) -> Any:
    if hasattr(leaf, "padding"):
        return _applied(lambda leaf: leaf.dequantize(), leaf) if leaf.padding else leaf.values
    return dataclasses.replace(leaf, kernels=()) if is_weight(leaf) else leaf


def _map_modules(params: Any, change: Any) -> Any:
    if not isinstance(params, dict) or is_weight(params):
        return params
    return {name: _map_modules(part, change) for name, part in change(params).items()}


def _fuse(module: dict[str, Any]) -> dict[str, Any]:
    """Projections of one input as one weight: fewer kernels to start at each step."""
    for fused, names in FUSED.items():
        parts = [module.get(name) for name in names]
        if any(not isinstance(part, dict) or set(part) != {"weight"} for part in parts):
            continue  # other layers, or some with a bias
        weights = [part["weight"] for part in parts]
        if len({(jax.tree.structure(weight), weight.shape[1], jnp.dtype(weight.dtype)) for weight in weights}) == 1:
            whole = jax.tree.map(lambda *rows: _applied(lambda *rows: jnp.concatenate(rows), *rows), *weights)
            module = {name: part for name, part in module.items() if name not in names} | {fused: {"weight": whole}}
    return module


def _split(module: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `_fuse`."""
    for fused, names in FUSED.items():
        if fused not in module:
            continue
        whole = module[fused]["weight"]
        num_outputs = whole.shape[0]
        # Queries are as many as the output projection takes; the others share what is left.
        first = module["o_proj"]["weight"].shape[1] if len(names) == 3 else num_outputs // 2
        each = (num_outputs - first) // (len(names) - 1)
        starts = [0, *(first + i * each for i in range(len(names)))]
        module = {name: part for name, part in module.items() if name != fused}
        for name, start, stop in zip(names, starts, starts[1:], strict=False):
            rows = functools.partial(_applied, lambda x, start=start, stop=stop: x[start:stop])
            module[name] = {"weight": jax.tree.map(rows, whole)}
    return module


def _padding(weight: Weight, target: Target) -> int:
    """Zeros after each row that may pay for a plain weight [F, D], which `autotune` decides; 0 where they cannot."""
    if hasattr(weight, "quantization") or len(weight.shape) != 2:
        return 0
    itemsize = jnp.dtype(weight.dtype).itemsize
    few = gemv.MOST_ROWS < target.num_rows <= matmul.ROWS_AT_ONCE
    if not few or itemsize != 2 or weight.size < LARGE or weight.shape[1] * itemsize % layout.PAGE_BYTES:
        return 0
    return layout.PADDING_BYTES // itemsize


def _float_kernels(weight: Weight, seconds: Seconds) -> Kernels:
    """The kernels of a plain weight on CPU; none is the reference."""
    if not seconds or weight.size < _GEMV_SIZE:
        return () if jnp.dtype(weight.dtype).itemsize > 2 else ((None, "x_first"),)
    few, most = seconds[f"x_first/{gemv.MOST_ROWS}"], seconds[f"x_first/{matmul.ROWS_AT_ONCE}"]
    other = seconds[f"weight_first/{matmul.ROWS_AT_ONCE}"]

    def order(seconds: float, gain: float, size: int = LARGE) -> str:
        return "weight_first" if weight.size >= size and seconds > gain * other else "x_first"

    def with_gemv(rows: int) -> str:
        found = seconds.get(f"gemv/{rows}")
        wins = found is not None and gemv.fits(weight.shape[0]) and min(few, other) > _CLEARLY * found
        return "gemv" if wins else order(few, _CLEARLY)

    many = order(most, _CLIFF, _VERY_LARGE)
    few_rows = [(rows, with_gemv(rows)) for rows in (1, gemv.MOST_ROWS)]
    return _merged([*few_rows, (matmul.FEW_ROWS, order(most, _CLEARLY)), (None, many)])


def _integer_kernels(weight: Weight, table: Table) -> Kernels:
    """The kernels of a quantized weight on CPU."""
    if not weight.quantize_activations:
        return ()
    packed = weight.quantization == "int4"
    dot = ("tiles_unsigned" if table.unsigned else "tiles") if packed else "dot"
    seconds = table.of(spec_of(weight, table.unsigned))
    fits = gemv.fits_groups(weight.shape[1] // weight.group_scale.shape[1]) if packed else gemv.fits(weight.shape[0])
    if not seconds or not fits or weight.size < _GEMV_SIZE:
        return ((None, dot),)
    measured = "tiles" if packed else "dot"

    def wins(rows: int) -> bool:
        return seconds[f"{measured}/{rows}"] > _CLEARLY * seconds[f"gemv/{rows}"]

    few = [(rows, "gemv" if wins(rows) else dot) for rows in (1, gemv.MOST_ROWS)]
    return _merged([*few, (None, dot)])


def _merged(kernels: list[tuple[int | None, str]]) -> Kernels:
    """Without bounds between rows that have the same kernel."""
    return tuple(
        entry for entry, following in zip(kernels, [*kernels[1:], (None, "")], strict=True) if entry[1] != following[1]
    )


def _with_values(weight: Weight, dtype: jnp.dtype) -> Weight:
    """An `Int8` whose integers are signed or have a zero point."""
    if weight.values.dtype == dtype:
        return weight
    return dataclasses.replace(weight, values=_applied(functools.partial(_flip, dtype=dtype), weight.values))


_flip = jax.jit(with_zero_point, static_argnames="dtype")
_pad = jax.jit(layout.pad, static_argnames="count")


def _applied(function: Any, *arrays: Any) -> Any:
    """A function of arrays, or of their shapes."""
    shapes = isinstance(jax.tree.leaves(arrays)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(function, *arrays) if shapes else function(*arrays)
