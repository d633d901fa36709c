"""Quantized weights in files: which tensors make one, and which parameters are quantized how.

A weight `X.weight` [F, D] is in 8 bits `X.weight` (I8, or U8 with a zero point of 128) and `X.weight_scale` [F] (F32);
in 4 bits `X.weight_packed` [F, D / 2] (U8), `X.weight_scale` and `X.weight_multiplier` [F, G] (I8, the group scales).
What the numbers mean is in `ops/weights.py`.

Axes: F outputs, D inputs, G groups of inputs.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax import ops
from paligemma_jax.checkpoints import tensor_files
from paligemma_jax.errors import CheckpointError

_SCALE, _PACKED, _GROUP_SCALE = ".weight_scale", ".weight_packed", ".weight_multiplier"
_DECODER = re.compile(r"language_model/(layers_\d+/.*_proj|embed_tokens|lm_head)/weight")
_ENCODER = re.compile(r"vision_tower/layers_\d+/.*(_proj|fc\d)/weight")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """Where the tensors of one quantized weight lie, as `tensor_files.Tensor` says it of a plain one."""

    values: tensor_files.Tensor
    scale: tensor_files.Tensor
    group_scale: tensor_files.Tensor | None = None

    @property
    def quantization(self) -> str:
        return "int8" if self.group_scale is None else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, D] of the weight."""
        num_outputs, width = self.values.shape
        return (num_outputs, width) if self.group_scale is None else (num_outputs, 2 * width)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts())

    def parts(self) -> list[tensor_files.Tensor]:
        """Its tensors, in the order of the fields of `ops.Int8` or `ops.Int4`."""
        return [tensor for tensor in (self.values, self.scale, self.group_scale) if tensor is not None]

    def read(self, path: str, dtype: np.dtype, advance: Callable[[int], None]) -> ops.Weight:
        """The weight of a parameter, of host arrays; it stands for numbers of `dtype`."""
        return self._weight([tensor_files.read(tensor, None, advance) for tensor in self.parts()], path, dtype)

    def abstract(self, path: str, dtype: np.dtype) -> ops.Weight:
        """What `read` gives, as shapes and dtypes only."""
        return self._weight([jax.ShapeDtypeStruct(tensor.shape, tensor.stored) for tensor in self.parts()], path, dtype)

    def _weight(self, parts: list[Any], path: str, dtype: np.dtype) -> ops.Weight:
        if self.group_scale is None:
            return ops.Int8(*parts, dtype, quantizes_activations(path))
        return ops.Int4(*parts, dtype)


def format_of(path: str, quantization: str) -> str | None:
    """The format, "int8" or "int4", that a quantization of the model gives a parameter; None where it stays plain.

    The decoder's matrices have the format asked for, the embedding table and an output head included; those of the
    image encoder, a small part of the weights, have 8 bits always.
    """
    if _DECODER.fullmatch(path):
        return quantization
    return "int8" if _ENCODER.fullmatch(path) else None


def quantizes_activations(path: str) -> bool:
    """Whether activations take 8 bits too where they are multiplied with a quantized parameter.

    Those of the image encoder do not: a few of them are so large that nothing would remain of the others.
    """
    return _ENCODER.fullmatch(path) is None


def quantize(path: str, leaf: Any, quantization: str) -> ops.Weight:
    """A plain parameter, or its shape, as a quantization of the model wants it; the leaf itself if that is plain."""
    form = format_of(path, quantization)
    if form is None:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return ops.quantized_shape(leaf, form, quantizes_activations(path))
    return ops.quantize(jax.device_put(leaf), form, quantizes_activations(path))


def gather(
    tensors: Mapping[str, tensor_files.Tensor], source: Path
) -> dict[str, tensor_files.Tensor | QuantizedTensor]:
    """Put the parts of each quantized weight together, under the name of the weight.

    Raises:
      CheckpointError: a part is missing, or is of another size or kind.
    """
    found: dict[str, tensor_files.Tensor | QuantizedTensor] = dict(tensors)
    for name in tensors:
        if not name.endswith(_SCALE):
            continue
        weight = name.removesuffix("_scale")
        base = weight.removesuffix(".weight")
        group_scale = found.pop(base + _GROUP_SCALE, None)
        values = found.pop(base + _PACKED if group_scale is not None else weight, None)
        found.pop(name)
        if values is None:
            raise CheckpointError(f"{source}: {name} has no weight beside it")
        _check(values, tensors[name], group_scale, source)
        found[weight] = QuantizedTensor(values, tensors[name], group_scale)
    return found


def _check(
    values: tensor_files.Tensor, scale: tensor_files.Tensor, group_scale: tensor_files.Tensor | None, source: Path
) -> None:
    wanted = {scale.name: (("F32",), 1), values.name: (("I8", "U8") if group_scale is None else ("U8",), 2)}
    if group_scale is not None:
        wanted[group_scale.name] = (("I8",), 2)
    for tensor in filter(None, (scale, values, group_scale)):
        dtypes, rank = wanted[tensor.name]
        if tensor.dtype not in dtypes or len(tensor.shape) != rank or tensor.shape[0] != values.shape[0]:
            raise CheckpointError(
                f"{source}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, which fits no weight"
            )
    num_groups = group_scale.shape[1] if group_scale is not None else 2
    if not num_groups or num_groups % 2 or 2 * values.shape[1] % num_groups:
        raise CheckpointError(f"{source}: {group_scale.name} has {num_groups} groups, which do not divide half a row")


def tensors_of(key: str, leaf: Any) -> dict[str, Any]:
    """Name -> array of what to write for a parameter whose name in the file is `key`, plain or quantized."""
    base = key.removesuffix(".weight")
    match getattr(leaf, "quantization", None):
        case "int8":
            return {key: leaf.values, base + _SCALE: leaf.scale}
        case "int4":
            return {base + _PACKED: leaf.values, base + _SCALE: leaf.scale, base + _GROUP_SCALE: leaf.group_scale}
        case _:
            return {key: leaf}
