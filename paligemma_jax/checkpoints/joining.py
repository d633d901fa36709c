"""Weights of the same inputs that lie one behind the other in a file, taken as one.

One product in place of two or three: a network so has a quarter fewer of them, and its programs are that much smaller
to compile, to load and to keep. Nothing is copied: the rows of `mlp/gate_proj/weight` and those of `mlp/up_proj/weight`
after it are those of `mlp/gate_proj+up_proj/weight`. Only weights that lie so are joined.

Axes: F outputs, D inputs.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from paligemma_jax.checkpoints import safetensors
from paligemma_jax.checkpoints.packed import Packed
from paligemma_jax.checkpoints.shapes import expected_shapes
from paligemma_jax.config import PaliGemmaConfig

if TYPE_CHECKING:
    from paligemma_jax.checkpoints.huggingface import Contents

JOINT = "+"  # between the names of weights that are one
_GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}

Weight = safetensors.Tensor | Packed


def join(contents: "Contents") -> "Contents":
    """Contents whose `tensors` are joined where they lie so.

    The attention of the last layer stays apart: prefill wants the queries of few tokens there, but the keys of all.
    """
    last = contents.config.text.num_layers - 1
    tensors = dict(contents.tensors)
    for layer, (module, names) in itertools.product(range(last + 1), _GROUPS.items()):
        prefix = f"language_model/layers_{layer}/{module}/"
        if layer == last and module == "self_attn":
            continue
        for run in _runs({name: contents.tensors[f"{prefix}{name}/weight"] for name in names}):
            if len(run) > 1:
                for name in run:
                    del tensors[f"{prefix}{name}/weight"]
                tensors[f"{prefix}{JOINT.join(run)}/weight"] = _joined(list(run.values()))
    return dataclasses.replace(contents, tensors=tensors)


def _runs(weights: Mapping[str, Weight]) -> list[dict[str, Weight]]:
    """Weights in the order of the file, those that can be joined together."""
    runs: list[dict[str, Weight]] = []
    before = None
    for name, weight in sorted(weights.items(), key=lambda item: _parts(item[1])[0].offset):
        if before is None or not _follows(weight, before):
            runs.append({})
        runs[-1][name] = before = weight
    return runs


def _parts(weight: Weight) -> list[safetensors.Tensor]:
    return weight.parts() if isinstance(weight, Packed) else [weight]


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
    return Packed(*parts, *[None] * (3 - len(parts))) if isinstance(weights[0], Packed) else parts[0]


def separate(flat: Mapping[str, Any], config: PaliGemmaConfig) -> dict[str, Any]:
    """Parameters by path, each weight [F, D] by itself."""
    shapes, apart = expected_shapes(config), {}
    for path, leaf in flat.items():
        *before, names, last = path.split("/")
        start = 0
        for name in names.split(JOINT):
            whole = "/".join((*before, name, last))
            if name == names:
                apart[whole] = leaf
                continue
            rows = slice(start, start := start + shapes[whole][0])
            apart[whole] = jax.tree.map(lambda part, rows=rows: part[rows], leaf)
    return apart
