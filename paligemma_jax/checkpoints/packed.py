"""Weights that are no plain arrays in files: which tensors make a quantized one, and how their names tell it; a padded
one is written as if it were plain.

Beside or in place of `X.weight` [F, D] stand, for 8 bits, `X.weight` (I8, or plus 128 as U8) and `X.weight_scale` [F]
(F32); for 4 bits `X.weight_packed` [F, D / 2] (U8), `X.weight_scale` and `X.weight_multiplier` [F, G] (I8). What the
numbers mean is in `models/quantized.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.checkpoints import tensor_files
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models import quantized
from paligemma_jax.models.padded import Padded
from paligemma_jax.models.quantized import Quantized

_SCALE, _PACKED, _MULTIPLIER = ".weight_scale", ".weight_packed", ".weight_multiplier"
_DECODER = re.compile(r"language_model/(layers_\d+/.*_proj|embed_tokens)/weight")
_ENCODER = re.compile(r"vision_tower/layers_\d+/.*(_proj|fc\d)/weight")


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where the tensors of one quantized weight lie."""

    values: tensor_files.Tensor
    scale: tensor_files.Tensor
    multiplier: tensor_files.Tensor | None = None

    @property
    def bits(self) -> str:
        return "int8" if self.multiplier is None else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, D] of the weight."""
        num_outputs, width = self.values.shape
        return (num_outputs, width) if self.multiplier is None else (num_outputs, 2 * width)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts())

    def parts(self) -> list[tensor_files.Tensor]:
        """Its tensors, in the order of the fields of `Quantized`."""
        return [tensor for tensor in (self.values, self.scale, self.multiplier) if tensor is not None]

    def abstract(self, path: str, dtype: np.dtype) -> Quantized:
        """The weight of a parameter as shapes and dtypes only."""
        parts = [jax.ShapeDtypeStruct(tensor.shape, tensor.stored) for tensor in self.parts()]
        if self.multiplier is None:
            parts[0] = jax.ShapeDtypeStruct(self.shape, quantized.values_dtype())
        return Quantized(*parts, *[None] * (3 - len(parts)), dtype, rounds(path))

    def read(
        self, path: str, dtype: np.dtype, advance: Callable[[int], None], place: Callable[[str, Any], Any]
    ) -> Quantized:
        """The weight of a parameter, each part read once and passed to `place`; it stands for numbers of `dtype`."""
        arrays = [tensor_files.read(tensor, None, advance) for tensor in self.parts()]
        if self.multiplier is None:
            arrays[0] = quantized.as_values(arrays[0], quantized.values_dtype())
        parts = [place(f"{path}/part", array) for array in arrays]
        return Quantized(*parts, *[None] * (3 - len(parts)), dtype, rounds(path))


def of_decoder(path: str) -> bool:
    """Whether a parameter is a weight that the decoder multiplies with, the table included."""
    return _DECODER.fullmatch(path) is not None


def bits_of(path: str, quantization: str) -> int | None:
    """The bits that "int8" or "int4" gives a parameter, None where it stays as it is.

    Every product of the decoder has them, and the table. Those of the image encoder, a small part of the weights, have
    8 always.
    """
    if of_decoder(path):
        return quantized.BITS[quantization]
    return quantized.BITS["int8"] if _ENCODER.fullmatch(path) else None


def rounds(path: str) -> bool:
    """Whether activations take 8 bits too, to be multiplied with a parameter that is quantized.

    Those of the image encoder do not: a few of them are so large that nothing would remain of the others.
    """
    return _ENCODER.fullmatch(path) is None


def gather(tensors: Mapping[str, tensor_files.Tensor], source: Path) -> dict[str, tensor_files.Tensor | Packed]:
    """Put the parts of each quantized weight together, under the name of the weight.

    Raises:
      CheckpointError: a part is missing, or is of another size or kind.
    """
    found: dict[str, tensor_files.Tensor | Packed] = dict(tensors)
    for name in tensors:
        if not name.endswith(_SCALE):
            continue
        weight = name.removesuffix("_scale")
        base = weight.removesuffix(".weight")
        multiplier = found.pop(base + _MULTIPLIER, None)
        values = found.pop(base + _PACKED if multiplier is not None else weight, None)
        found.pop(name)
        if values is None:
            raise CheckpointError(f"{source}: {name} has no weight beside it")
        _check(values, tensors[name], multiplier, source)
        found[weight] = Packed(values, tensors[name], multiplier)
    return found


def _check(
    values: tensor_files.Tensor, scale: tensor_files.Tensor, multiplier: tensor_files.Tensor | None, source: Path
) -> None:
    wanted = {scale.name: (("F32",), 1), values.name: (("I8", "U8") if multiplier is None else ("U8",), 2)}
    if multiplier is not None:
        wanted[multiplier.name] = (("I8",), 2)
    for tensor in filter(None, (scale, values, multiplier)):
        dtypes, rank = wanted[tensor.name]
        if tensor.dtype not in dtypes or len(tensor.shape) != rank or tensor.shape[0] != values.shape[0]:
            raise CheckpointError(
                f"{source}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, which fits no weight"
            )
    num_groups = multiplier.shape[1] if multiplier is not None else 2
    if not num_groups or num_groups % 2 or 2 * values.shape[1] % num_groups:
        raise CheckpointError(f"{source}: {multiplier.name} has {num_groups} groups, which do not divide half a row")


def parts_of(key: str, leaf: Any) -> dict[str, Any]:
    """The arrays to write for a parameter whose name in the file is `key`."""
    if isinstance(leaf, Padded):
        return {key: np.asarray(leaf.values)[:, : leaf.width]}
    if not isinstance(leaf, Quantized):
        return {key: leaf}
    base = key.removesuffix(".weight")
    if leaf.multiplier is None:
        return {key: leaf.values, base + _SCALE: leaf.scale}
    return {base + _PACKED: leaf.values, base + _SCALE: leaf.scale, base + _MULTIPLIER: leaf.multiplier}
