"""Files to parameter trees and back. The format is told from the path: a directory is Hugging Face's, a file .npz."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax.checkpoints import big_vision, huggingface, packed
from paligemma_jax.checkpoints.arrays import dtype_named
from paligemma_jax.checkpoints.hub import resolve
from paligemma_jax.checkpoints.place import Place, on_device, padded
from paligemma_jax.checkpoints.shapes import expected_shapes, parameter_count
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models import quantized
from paligemma_jax.models.padded import Padded, padding

__all__ = ["Contents", "abstract", "expected_shapes", "load", "parameter_count", "resolve", "save", "scan"]

Contents = huggingface.Contents | big_vision.Contents


def scan(path: Path, config: PaliGemmaConfig | None = None) -> Contents:
    """Verify a directory or .npz from its headers, reading no tensor; the result has its `config`, for `load`.

    Args:
      path: see `resolve`.
      config: geometry of an .npz that is no released model's; a directory has its own.
    """
    return huggingface.scan(path) if path.is_dir() else big_vision.scan(path, config)


def load(
    source: str | Path | Contents,
    dtype: str | None = "bfloat16",
    progress: bool = True,
    place: Place = on_device,
    config: PaliGemmaConfig | None = None,
    quantization: str | None = None,
    num_rows: int = 1,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """Geometry and parameter tree of a Hugging Face directory, a hub id or a big_vision .npz.

    Args:
      source: directory, .npz file or hub id ("org/name"), or what `scan` found there.
      dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's own.
      progress: report a slow load on stderr.
      place: called with the path and the array of each parameter once it is read, to put it where it belongs.
      config: as for `scan`.
      quantization: "int8" or "int4", to round weights as they come (`packed.bits_of`); None takes them as they are.
      num_rows: what the decoder's weights will be multiplied with at once: for some numbers they are laid out anew, as
        `models.padded.Padded`.
    Raises:
      ConfigError, CheckpointError: nothing is read unless the whole fits.
    """
    contents = source if isinstance(source, Contents) else scan(resolve(source), config)
    _check_quantization(quantization, contents)
    if quantization or contents.quantization:
        quantized.values_dtype()  # measured now, because nothing else runs
    if num_rows > 1:
        shapes = abstract(contents, dtype or "bfloat16", quantization, num_rows)  # so are the weights
        place = padded(flatten_dict(shapes, sep="/"), place)
    if quantization is not None:
        place = _quantizing(quantization, place)
    read = huggingface.load if isinstance(contents, huggingface.Contents) else big_vision.load
    return read(contents, dtype, progress, place)


def abstract(contents: Contents, dtype: str, quantization: str | None = None, num_rows: int = 1) -> dict[str, Any]:
    """What `load` will give, as shapes and dtypes only."""
    target = dtype_named(dtype)
    _check_quantization(quantization, contents)
    if isinstance(contents, huggingface.Contents):
        tensors, shapes = contents.tensors, {path: tensor.shape for path, tensor in contents.tensors.items()}
    else:
        tensors, shapes = {}, expected_shapes(contents.config)

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        tensor = tensors.get(path)
        if isinstance(tensor, packed.Packed):
            return tensor.abstract(path, target)
        struct = jax.ShapeDtypeStruct(shape, target)
        bits = packed.bits_of(path, quantization) if quantization else None
        if bits is not None:
            return quantized.abstract(struct, bits, packed.rounds(path))
        if packed.of_decoder(path) and (more := padding(struct, num_rows)):
            return Padded(jax.ShapeDtypeStruct((shape[0], shape[1] + more), target), shape[1])
        return struct

    return unflatten_dict({path: leaf(path, shape) for path, shape in shapes.items()}, sep="/")


def _check_quantization(name: str | None, contents: Contents) -> None:
    if name is not None and name not in quantized.BITS:
        raise ConfigError(f"quantization {name!r} is unknown: use {' or '.join(quantized.BITS)}, or leave it out")
    if name is not None and contents.quantization not in (None, name):
        raise ConfigError(
            f"the checkpoint is {contents.quantization} already: leave quantization={name!r} out, or give the original"
        )


def _quantizing(name: str, place: Place) -> Place:
    """`place` with weights rounded on their way."""

    def rounded(path: str, array: Any) -> Any:
        bits = packed.bits_of(path, name)
        if bits is None:
            return place(path, array)
        weight = quantized.quantize(jax.device_put(array), bits, packed.rounds(path))
        return jax.tree.map(lambda part: place(f"{path}/part", part), weight)

    return rounded


def save(
    directory: str | Path,
    config: PaliGemmaConfig,
    params: Mapping[str, Any],
    dtype: str | None = None,
    processor_from: Path | None = None,
) -> None:
    """Write a Hugging Face directory; arguments as for `huggingface.save`."""
    huggingface.save(Path(directory), config, params, dtype, processor_from=processor_from)
