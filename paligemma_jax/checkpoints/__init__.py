"""Files to parameter trees and back. The format is told from the path: a directory is Hugging Face's, a file .npz."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from paligemma_jax import ops
from paligemma_jax.checkpoints import adapters, big_vision, fusion, huggingface, quantized
from paligemma_jax.checkpoints.arrays import dtype_named
from paligemma_jax.checkpoints.fusion import fused_shapes
from paligemma_jax.checkpoints.hub import Source, locate, resolve
from paligemma_jax.checkpoints.shapes import expected_shapes, parameter_count
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError

__all__ = [
    "Contents",
    "Source",
    "abstract",
    "expected_shapes",
    "fused_shapes",
    "load",
    "locate",
    "on_device",
    "parameter_count",
    "resolve",
    "save",
    "scan",
]

Contents = huggingface.Contents | big_vision.Contents | adapters.Contents


def on_device(path: str, leaf: Any) -> Any:
    """The `place` of a parameter that is used as it is: the default device."""
    return jax.device_put(leaf)


def scan(source: Source | Path, config: PaliGemmaConfig | None = None) -> Contents:
    """Verify a directory or .npz from its headers, reading no tensor; the result has its `config`, for `load`.

    Args:
      source: see `locate`; a path is one without an adapter.
      config: geometry of an .npz that is no released model's; a directory has its own.
    """
    path, adapter = source if isinstance(source, Source) else (source, None)
    base = huggingface.scan(path) if path.is_dir() else big_vision.scan(path, config)
    return base if adapter is None else adapters.scan(adapter, base)


def load(
    source: str | Path | Contents,
    dtype: str | None = "bfloat16",
    progress: bool = True,
    config: PaliGemmaConfig | None = None,
    quantization: str | None = None,
    place: Callable[[str, Any], Any] = on_device,
    fuse: bool = True,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """Geometry and parameter tree of a Hugging Face directory, a hub id, a big_vision .npz or an adapter over one.

    Plain weights have the paths of `expected_shapes`. Quantized ones are fused (`fused_shapes`) where they are in the
    file, and always where `quantization` makes them so, unless `fuse` says no.

    Args:
      source: directory, .npz file or hub id ("org/name"), or what `scan` found.
      dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's own.
      progress: report a slow load on stderr, and what is to be noted.
      config: as for `scan`.
      quantization: "int8" or "int4", to round weights as they come (`quantized.format_of`); None takes them as they
        are.
      place: called with the path of each parameter and what was read, by several threads: an array, or a weight of
        arrays, in host memory but for what was just quantized. What it returns is in the tree: it puts the parameter
        on a device, and may prepare it (`ops.prepare_leaf`).
      fuse: False takes all projections apart, as several devices that divide heads need them.
    Raises:
      ConfigError, CheckpointError: nothing is read unless the whole fits.
    """
    contents = source if isinstance(source, Contents) else scan(locate(source), config)
    target = dtype_named(dtype) if dtype else None
    params: dict[str, Any] = {}

    def emit(path: str, leaf: Any) -> None:
        params[path] = place(path, leaf)

    for note in contents.notes if progress else ():
        print(f"note: {note}", file=sys.stderr)
    read = next(part.read for part in (huggingface, big_vision, adapters) if isinstance(contents, part.Contents))
    read(contents, target, progress, _quantizing(quantization, contents, emit, fuse))
    return contents.config, unflatten_dict({path: params[path] for path in sorted(params)}, sep="/")


def abstract(contents: Contents, dtype: str, quantization: str | None = None, fuse: bool = True) -> dict[str, Any]:
    """The tree that `load` gives if `place` changes nothing, as shapes and dtypes only.

    Its leaves are `jax.ShapeDtypeStruct`, or `ops.Int8` and `ops.Int4` of them.
    """
    target = dtype_named(dtype)
    params: dict[str, Any] = {}
    emit = _quantizing(quantization, contents, params.__setitem__, fuse)
    if isinstance(contents, huggingface.Contents):
        for path, tensor in contents.tensors.items():
            is_plain = not isinstance(tensor, quantized.QuantizedTensor)
            emit(path, jax.ShapeDtypeStruct(tensor.shape, target) if is_plain else tensor.abstract(path, target))
    else:
        for path, shape in expected_shapes(contents.config).items():
            emit(path, jax.ShapeDtypeStruct(shape, target))
    return unflatten_dict({path: params[path] for path in sorted(params)}, sep="/")


def _quantizing(
    name: str | None, contents: Contents, emit: Callable[[str, Any], None], fuse: bool
) -> Callable[[str, Any], None]:
    """`emit` with parameters quantized and fused before, if a quantization is asked for that the file does not have."""
    if name is not None and name not in ops.FORMATS:
        raise ConfigError(f"quantization {name!r} is unknown: use {' or '.join(ops.FORMATS)}, or leave it out")
    if name is not None and contents.quantization not in (None, name):
        raise ConfigError(
            f"the checkpoint is {contents.quantization} already: leave quantization={name!r} out, or give the original"
        )
    if name is None or contents.quantization is not None:
        return emit if fuse else fusion.Splitting(emit, expected_shapes(contents.config))
    fusing = fusion.Fusing(emit) if fuse else emit
    return lambda path, leaf: fusing(path, quantized.quantize(path, leaf, name))


def save(
    directory: str | Path,
    config: PaliGemmaConfig,
    params: Mapping[str, Any],
    dtype: str | None = None,
    processor_from: Sequence[Path] = (),
) -> None:
    """Write a Hugging Face directory; arguments as for `huggingface.save`."""
    huggingface.save(Path(directory), config, params, dtype, processor_from=processor_from)
