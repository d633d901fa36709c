"""Weights of the same inputs that lie one behind the other in a file, taken as one.

One product in place of two or three: a layer of the decoder has four instead of seven in files written here, five where
names are in order, and its programs are that much smaller to compile, to load and to keep. Nothing is copied: the rows
of `mlp/gate_proj/weight` and after them those of `mlp/up_proj/weight` are those of `mlp/gate_proj+up_proj/weight`.

Axes: F outputs, D inputs.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.checkpoints import safetensors
from paligemma_jax.checkpoints.packed import Packed
from paligemma_jax.checkpoints.shapes import expected_shapes
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.layers import JOINT

_GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}

Weight = safetensors.Tensor | Packed


def join(tensors: Mapping[str, Weight], num_layers: int) -> dict[str, Weight]:
    """Where parameters lie, by path, with those of the decoder joined that can be.

    The attention of the last layer stays apart: prefill wants the queries of few tokens there, but the keys of all.
    """
    joined = dict(tensors)
    for layer, (module, names) in itertools.product(range(num_layers), _GROUPS.items()):
        prefix = f"language_model/layers_{layer}/{module}/"
        if layer == num_layers - 1 and module == "self_attn":
            continue
        for run in _runs({name: tensors[f"{prefix}{name}/weight"] for name in names}):
            if len(run) > 1:
                for name in run:
                    del joined[f"{prefix}{name}/weight"]
                joined[f"{prefix}{JOINT.join(run)}/weight"] = _joined(list(run.values()))
    return joined


def _runs(weights: Mapping[str, Weight]) -> list[dict[str, Weight]]:
    """Weights in the order of their files, those that can be joined together."""
    runs: list[dict[str, Weight]] = []
    before = None
    for name, weight in sorted(weights.items(), key=lambda item: _place(item[1])):
        if before is None or not _follows(weight, before):
            runs.append({})
        runs[-1][name] = before = weight
    return runs


def _parts(weight: Weight) -> list[safetensors.Tensor]:
    return weight.parts() if isinstance(weight, Packed) else [weight]


def _place(weight: Weight) -> tuple[Path, int]:
    first = _parts(weight)[0]
    return first.file, first.offset


def _follows(weight: Weight, before: Weight) -> bool:
    pairs = list(zip(_parts(before), _parts(weight), strict=False))
    return len(_parts(before)) == len(_parts(weight)) and all(
        (a.file, a.dtype, a.shape[1:], a.offset + a.nbytes) == (b.file, b.dtype, b.shape[1:], b.offset)
        for a, b in pairs
    )


def _joined(weights: list[Weight]) -> Weight:
    parts = []
    for tensors in zip(*map(_parts, weights), strict=True):
        num_outputs = sum(tensor.shape[0] for tensor in tensors)
        name = JOINT.join(tensor.name for tensor in tensors)
        parts.append(tensors[0]._replace(name=name, shape=(num_outputs, *tensors[0].shape[1:])))
    return Packed(*parts) if isinstance(weights[0], Packed) else parts[0]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of an array, taken only when they are read."""

    array: Any
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        start, stop, _ = self.rows.indices(len(self.array))
        return stop - start, *self.array.shape[1:]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array[self.rows], dtype)


def separate(flat: Mapping[str, Any], config: PaliGemmaConfig) -> dict[str, Any]:
    """Parameters by path, each weight [F, D] by itself, for `numpy.asarray` to read.

    What is joined but no parameter of the geometry stays as it is.
    """
    shapes, apart = expected_shapes(config), {}
    for path, leaf in flat.items():
        module, _, last = path.rpartition("/")
        prefix, slash, names = module.rpartition("/")
        wholes = [f"{prefix}{slash}{name}/{last}" for name in names.split(JOINT)]
        if len(wholes) == 1 or not set(wholes) <= set(shapes):
            apart[path] = leaf
            continue
        starts = [0, *itertools.accumulate(shapes[whole][0] for whole in wholes[:-1])]
        for whole, rows in zip(wholes, map(slice, starts, [*starts[1:], None]), strict=True):
            apart[whole] = jax.tree.map(lambda part, rows=rows: _Rows(part, rows), leaf)
    return apart
