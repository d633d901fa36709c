"""What `pj.load` would say of a checkpoint, all of it at once, and what the checkpoint holds."""

import math
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from paligemma_jax.checkpoints import (
    Contents,
    Source,
    adapters,
    big_vision,
    huggingface,
    parameter_count,
    scan,
    shapes,
    tensor_files,
)
from paligemma_jax.checkpoints.mask_vae import load_mask_vae
from paligemma_jax.config import PaliGemmaConfig, variant_name
from paligemma_jax.errors import CheckpointError, UserError, one_line
from paligemma_jax.loading import find_mask_vae, read_image_settings, read_tokenizer

_SMALL = 1 << 16  # bytes of a tensor that is looked into
_PIECE = 1 << 20  # bytes of an .npz that are read at a time; an array of no more is looked into: all layers of a norm


class Verification(NamedTuple):
    """What was found: the contents, unless the weights are at fault, and lines for the user."""

    contents: Contents | None
    problems: list[str]  # for each of which loading fails
    notes: list[str]


def verification(source: Source, config: PaliGemmaConfig | None = None) -> Verification:
    """Try what loading does, reading no weights but those of an .npz, which has checksums.

    Args:
      source: from `locate`.
      config: as for `scan`.
    """
    problems: list[str] = []
    notes: list[str] = []

    def attempt(function: Callable[..., Any], *arguments: Any, failures: list[str] = problems) -> Any:
        try:
            return function(*arguments)
        except (UserError, OSError) as error:
            failures.append(str(error))
            return None

    contents = attempt(scan, source, config)
    if contents is not None:
        notes += contents.notes
        config = contents.config
    elif source.base.is_dir():  # what is wrong with the config was said already
        config = attempt(huggingface.read_config, source.base, failures=[])
    odd: list[str] = []
    if contents is not None and source.base.is_file():
        base = contents.base if isinstance(contents, adapters.Contents) else contents
        odd = attempt(_check_arrays, base) or []
    odd += attempt(_not_finite, contents) or []
    if odd:
        notes.append(f"NaN or infinity in {shapes.fold(odd)}: answers will mean nothing")
    tokenizer = attempt(read_tokenizer, source)
    if config is not None:
        if tokenizer is not None:
            attempt(tokenizer.check, config)
        attempt(read_image_settings, source, config)
    masks = attempt(find_mask_vae, source)
    if masks is not None:  # it is read when a mask is asked for
        attempt(load_mask_vae, masks, failures=notes)
    return Verification(contents, problems, notes)


def _not_finite(contents: Contents | None) -> list[str]:
    """Names of the small tensors, norms and biases, that hold no finite numbers; what spoils one spoils most."""
    small = [tensor for tensor in _tensors(contents) if tensor.nbytes <= _SMALL]
    return [t.name for t in small if not np.isfinite(tensor_files.read(t, np.dtype(np.float32))).all()]


def _tensors(contents: Contents | None) -> list[tensor_files.Tensor]:
    """The plain tensors of a directory, or of an adapter and of a directory under it."""
    if isinstance(contents, adapters.Contents):
        parts = [part for change in contents.changes.values() for part in vars(change).values()]
        own = [part for part in parts if isinstance(part, tensor_files.Tensor)]
        return [*_tensors(contents.base), *{tensor.name: tensor for tensor in own}.values()]
    tensors = contents.tensors.values() if isinstance(contents, huggingface.Contents) else ()
    return [tensor for tensor in tensors if isinstance(tensor, tensor_files.Tensor)]


def _check_arrays(contents: big_vision.Contents) -> list[str]:
    """Names of the arrays of an .npz that are small and hold no finite numbers.

    Raises:
      CheckpointError: one that is read does not have its checksum; what lies beside them may be damaged.
    """
    odd = []
    try:
        with zipfile.ZipFile(contents.path) as archive:
            for key, member in contents.members.items():
                with archive.open(member.name) as stream:
                    if math.prod(member.shape) * member.stored.itemsize <= _PIECE:
                        array = np.lib.format.read_array(stream, allow_pickle=False).view(member.stored)
                        odd += [] if np.isfinite(array.astype(np.float32)).all() else [key]
                    while stream.read(_PIECE):  # the sum is compared at the end
                        pass
    # RuntimeError: encrypted, or packed in a way that is not supported; ValueError: fewer elements than there should be
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{contents.path} is damaged or truncated ({one_line(error)})") from None
    return odd


def describe(contents: Contents) -> dict[str, str]:
    """What a checkpoint holds, by what to call it."""
    config, paths = contents.config, contents.weight_files
    vision, text = config.vision, config.text
    window = f", window {text.sliding_window}" if text.sliding_window else ""
    softcaps = f", softcaps {text.attn_softcap} / {text.final_softcap}" if config.version == 2 else ""
    head = "" if text.tied else ", a head of its own"
    return {
        "format": _format(contents),
        "variant": variant_name(config) or f"custom PaliGemma {config.version}",
        "parameters": f"{parameter_count(config):,}",
        "dtype": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in contents.dtypes.items()),
        "bytes": f"{sum(path.stat().st_size for path in paths):,}",
        "vision": f"{vision.image_size} px, {vision.num_tokens} tokens, {vision.num_layers} layers of {vision.width}",
        "text": f"{text.num_layers} layers of {text.width}, {text.num_heads} / {text.num_kv_heads} heads of "
        f"{text.head_dim}, {text.vocab_size} rows{head}{softcaps}{window}",
    }


def _format(contents: Contents) -> str:
    if isinstance(contents, adapters.Contents):
        return f"{_format(contents.base)}, and an adapter of {len(contents.changes)} parameters"
    if isinstance(contents, big_vision.Contents):
        return "big_vision .npz"
    count = len(contents.weight_files)
    return f"Hugging Face, layout {contents.layout}, {count} file{'s' if count > 1 else ''}"
