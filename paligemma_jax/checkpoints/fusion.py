"""Projections of one input as one weight: q, k and v of an attention, gate and up of an MLP of the decoder.

In a parameter tree and in files a fused weight has a name of its own, "self_attn/qkv_proj" or "mlp/gate_up_proj", and
its rows are those of its parts in order (`ops.FUSED`). Quantized checkpoints are written so, and load without a copy;
plain ones have the names of Hugging Face, for other tools.

Axes: F outputs, D inputs.
"""

import dataclasses
import functools
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax import ops
from paligemma_jax.checkpoints.shapes import Shape, expected_shapes
from paligemma_jax.config import PaliGemmaConfig

_DECODER_LAYER = re.compile(r"(language_model/layers_\d+/(?:self_attn|mlp)/)(\w+)/weight")
_FUSED_OF = {part: fused for fused, parts in ops.FUSED.items() for part in parts}


class Group(NamedTuple):
    """The path of a fused weight and those of its parts, in the order of their rows."""

    fused: str
    parts: tuple[str, ...]


def group_of(path: str) -> Group | None:
    """The group of a parameter, fused or a part; None for those that are always by themselves."""
    match = _DECODER_LAYER.fullmatch(path)
    name = match and _FUSED_OF.get(match[2], match[2])
    if name not in ops.FUSED:
        return None
    return Group(f"{match[1]}{name}/weight", tuple(f"{match[1]}{part}/weight" for part in ops.FUSED[name]))


def fused_shapes(config: PaliGemmaConfig, is_fused: Callable[[str], bool] = lambda path: True) -> dict[str, Shape]:
    """`expected_shapes` with the parts of groups replaced by the fused weight, where `is_fused` says so of its path."""
    shapes: dict[str, Shape] = {}
    for path, shape in expected_shapes(config).items():
        group = group_of(path)
        if group and is_fused(group.fused):
            num_outputs, *_ = shapes.get(group.fused, (0,))
            path, shape = group.fused, (num_outputs + shape[0], *shape[1:])
        shapes[path] = shape
    return shapes


class Fusing:
    """Callback that passes parameters on, quantized parts of a group as one as soon as all are there.

    To fuse after quantizing moves few bytes, and changes none: each row has a scale of its own.
    """

    def __init__(self, emit: Callable[[str, Any], None]):
        self._emit, self._lock = emit, threading.Lock()
        self._waiting: dict[str, dict[str, Any]] = {}  # path of a fused weight -> its parts so far

    def __call__(self, path: str, leaf: Any) -> None:
        group = group_of(path)
        if group is None or path == group.fused or not hasattr(leaf, "quantization"):
            return self._emit(path, leaf)
        with self._lock:
            found = self._waiting.setdefault(group.fused, {})
            found[path] = leaf
            if len(found) < len(group.parts):
                return None
            del self._waiting[group.fused]
        return self._emit(group.fused, jax.tree.map(_concatenate, *(found[part] for part in group.parts)))


class Splitting:
    """Callback that passes parameters on, fused ones as their parts: the reverse of `Fusing`."""

    def __init__(self, emit: Callable[[str, Any], None], shapes: Mapping[str, Shape]):
        self._emit, self._shapes = emit, shapes

    def __call__(self, path: str, leaf: Any) -> None:
        group = group_of(path)
        if group is None or path != group.fused:
            return self._emit(path, leaf)
        stop = 0
        for part in group.parts:
            start, stop = stop, stop + self._shapes[part][0]
            self._emit(part, jax.tree.map(functools.partial(_slice, start=start, stop=stop), leaf))
        return None


def _slice(rows: Any, start: int, stop: int) -> Any:
    if not isinstance(rows, jax.ShapeDtypeStruct):
        return rows[start:stop]
    return jax.ShapeDtypeStruct((stop - start, *rows.shape[1:]), rows.dtype)


def _concatenate(*rows: Any) -> Any:
    if not isinstance(rows[0], jax.ShapeDtypeStruct):
        return jnp.concatenate(rows)
    return jax.ShapeDtypeStruct((sum(part.shape[0] for part in rows), *rows[0].shape[1:]), rows[0].dtype)


def take(leaves: Mapping[str, Any], path: str, shapes: Mapping[str, Shape]) -> Any:
    """The parameter at a path, also where `leaves` has its group in another form: fused or in parts.

    The rows of it are then taken, or put together, when `numpy.asarray` reads them.

    Args:
      leaves: path -> parameter.
      path: of a parameter of the geometry, or of a fused one.
      shapes: those of the geometry, unfused.
    """
    if path in leaves:
        return leaves[path]
    group = group_of(path)
    if path == group.fused:
        return jax.tree.map(lambda *parts: _Rows(parts, slice(None)), *(leaves[part] for part in group.parts))
    start = sum(shapes[part][0] for part in group.parts[: group.parts.index(path)])
    rows = slice(start, start + shapes[path][0])
    return jax.tree.map(lambda part: _Rows((part,), rows), leaves[group.fused])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of arrays [F, ...] that lie one behind the other, put together only when they are read."""

    parts: tuple[Any, ...]
    rows: slice

    @property
    def shape(self) -> Shape:
        num_rows = len(range(sum(part.shape[0] for part in self.parts))[self.rows])
        return num_rows, *self.parts[0].shape[1:]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        parts = [np.asarray(part) for part in self.parts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.asarray(whole[self.rows], dtype)
