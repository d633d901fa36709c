"""Hugging Face checkpoints: a directory with config.json and safetensors, single or in shards.

Three layouts of names are read: A, the hub's files (`language_model.model.*`, `vision_tower.vision_model.*`); B,
transformers 4.52 and later in memory (`model.language_model.*`); C, a transformers 5 save (`vision_tower.*` without
`vision_model`). Written is A, the one that every version of transformers and other tools read.
"""

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from paligemma_jax import files, ops
from paligemma_jax.checkpoints import (
    adapter_config,
    companions,
    config_json,
    foreign,
    fusion,
    quantized,
    shapes,
    tensor_files,
)
from paligemma_jax.checkpoints.arrays import ALIGNMENT, dtype_named
from paligemma_jax.checkpoints.quantized import QuantizedTensor
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, one_line, printable

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

_EMBED, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_TO_LAYOUT_A = (  # our path -> key; every rule that matches applies, in this order
    (r"/", "."),
    (r"layers_(\d+)", r"layers.\1"),
    (r"^vision_tower\.(\w+_embedding\.)", r"vision_tower.embeddings.\1"),
    (r"^vision_tower\.layers", "vision_tower.encoder.layers"),
    (r"^vision_tower", "vision_tower.vision_model"),
    (r"^language_model(?!\.lm_head)", "language_model.model"),
)
_NORMS = {  # our name -> theirs; what Gemma 1 calls post_attention_layernorm is the norm before the MLP
    1: {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"},
    2: {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_FROM_ANY_LAYOUT = (  # key -> layout A
    (r"^(module\.|_orig_mod\.)+", ""),  # of trainers that save what they have wrapped
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector|lm_head)", ""),
    (r"^lm_head", "language_model.lm_head"),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# The pooling head that PaliGemma never runs, and buffers that older versions saved.
UNUSED = re.compile(r"vision_model\.head\.|\.position_ids$|\.rotary_emb\.inv_freq$")
_READERS = 4


@dataclasses.dataclass(frozen=True)
class Contents:
    """A verified checkpoint of which no tensor was read yet."""

    directory: Path
    config: PaliGemmaConfig
    tensors: dict[str, tensor_files.Tensor | QuantizedTensor]  # our path -> place in a file
    layout: str  # "A", "B" or "C"
    weight_files: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # what a user should know of it

    @property
    def dtypes(self) -> Counter[str]:
        """How many tensors have each dtype ("bfloat16")."""
        return Counter(
            tensor.quantization if isinstance(tensor, QuantizedTensor) else tensor_files.STORED[tensor.dtype].name
            for tensor in self.tensors.values()
        )

    @property
    def quantization(self) -> str | None:
        """ "int8" or "int4" when it holds quantized weights."""
        found = {tensor.quantization for tensor in self.tensors.values() if isinstance(tensor, QuantizedTensor)}
        return min(found, default=None)  # beside a decoder in 4 bits the encoder has 8


def key_of(path: str, version: int) -> str:
    """Layout A's name of a parameter: "language_model/norm/weight" -> "language_model.model.norm.weight"."""
    for pattern, replacement in _TO_LAYOUT_A:
        path = re.sub(pattern, replacement, path)
    return ".".join(_NORMS[version].get(part, part) for part in path.split("."))


def scan(directory: Path) -> Contents:
    """Verify a checkpoint from its config.json and the headers of its weight files, reading no tensor.

    Raises:
      ConfigError: config.json cannot be honoured.
      CheckpointError: a file is missing or damaged, or the tensors are not those of the geometry.
    """
    if named := foreign.recognize(directory):
        raise CheckpointError(named)
    config = read_config(directory)
    headers = read_headers(directory)
    foreign.check_tensors(headers, directory)
    tensors = {}
    for key, tensor in headers.items():
        name = canonical(key)
        if UNUSED.search(name):
            continue
        if name in tensors and not _equal(tensors[name], tensor):
            both = f"{tensors[name].name} and {key}"
            raise CheckpointError(f"{directory}: {both} are the same parameter, but their contents differ")
        tensors[name] = tensor
    tensors = quantized.gather(tensors, directory)
    tensors, notes = _tie_head(tensors, config.text.tied, directory / CONFIG)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied=_HEAD not in tensors))
    by_path = fusion.fused_shapes(config, lambda path: key_of(path, config.version) in tensors)
    expected = {key_of(path, config.version): shape for path, shape in by_path.items()}
    problems = shapes.differences({name: tensor.shape for name, tensor in tensors.items()}, expected)
    problems = [f"the weights do not fit config.json: {problems}{_hint(tensors, config)}"] if problems else []
    plain = [tensor for tensor in tensors.values() if isinstance(tensor, tensor_files.Tensor)]
    odd = sorted({tensor.dtype for tensor in plain} - set(tensor_files.FLOATS))
    if odd:
        names = shapes.fold([tensor.name for tensor in plain if tensor.dtype in odd])
        problems.append(f"only F32, F16 and BF16 weights are read, not {', '.join(odd)}: {names}")
    if problems:
        raise CheckpointError(f"{directory}: {'; '.join(problems)}")
    found = {path: tensors[key_of(path, config.version)] for path in by_path}
    weight_files = tuple(sorted({tensor.file for tensor in headers.values()}))
    return Contents(directory, config, found, _layout(headers), weight_files, notes)


def read_config(directory: Path) -> PaliGemmaConfig:
    """The geometry that config.json states, with what ends an answer by generation_config.json; errors as of `scan`."""
    path = directory / CONFIG
    config = config_json.from_json(foreign.checked_config(files.read_json(path), path), str(path))
    return companions.with_generation(config, directory)


def canonical(key: str) -> str:
    """A key of any layout as layout A has it."""
    for pattern, replacement in _FROM_ANY_LAYOUT:
        key = re.sub(pattern, replacement, key)
    return key


def _layout(keys: Mapping[str, Any]) -> str:
    if any(key.startswith("model.") for key in keys):
        return "B"
    return "A" if any(key.startswith("vision_tower.vision_model.") for key in keys) else "C"


def _tie_head(tensors: dict[str, Any], stated_tied: bool, config_path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors without an output head that is the embedding table, and what is to be noted; as transformers has it.

    A head that differs is one of its own, whatever config.json says; one that is missing can be tied only.
    """
    head, table = tensors.get(_HEAD), tensors.get(_EMBED)
    if head is None and not stated_tied:
        remedy = "say true where the head is the embedding table, or get the weights that have it"
        raise CheckpointError(f"{config_path}: tie_word_embeddings is false, but there is no lm_head.weight: {remedy}")
    if head is None or (table is None and not stated_tied):
        return tensors, ()
    rest = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    if table is None:
        return {_EMBED: head} | rest, ()
    if _equal(table, head):
        return rest, ()
    note = f"lm_head.weight is not the embedding table, though {config_path} says that they are tied: it is used"
    return tensors, (note,) if stated_tied else ()


def _equal(first: Any, second: Any) -> bool:
    """Whether two tensors hold equal numbers; quantized ones are not compared."""
    pair = (first, second)
    if not all(isinstance(t, tensor_files.Tensor) and t.dtype in tensor_files.FLOATS for t in pair):
        return False
    return first.shape == second.shape and tensor_files.same_values(first, second)


def _hint(tensors: Mapping[str, Any], config: PaliGemmaConfig) -> str:
    patches = tensors.get("vision_tower.vision_model.embeddings.patch_embedding.weight")
    if patches is not None and len(patches.shape) == 4 and patches.shape[1] != 3 == patches.shape[3]:
        return " (the axes are MLX's: give the original checkpoint)"
    version = 2 if any("pre_feedforward_layernorm" in key for key in tensors) else 1
    if version == config.version or not any(key.startswith("language_model.") for key in tensors):
        return ""
    names = {1: "'gemma' (PaliGemma 1)", 2: "'gemma2' (PaliGemma 2)"}
    return f" (these are weights of {names[version]}, but text_config.model_type says {names[config.version]})"


def read_headers(directory: Path) -> dict[str, tensor_files.Tensor]:
    if (directory / SINGLE).is_file():
        return tensor_files.read_header(directory / SINGLE)
    index = directory / INDEX
    if not index.is_file():
        pickled = any(directory.glob("*.bin"))
        reason = "its .bin files are not read, save it as safetensors" if pickled else f"expected {SINGLE} or {INDEX}"
        raise CheckpointError(f"{directory} holds no safetensors weights: {reason}")
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(n, str) and Path(n).name == n for n in weight_map.values()
    ):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.isfile(directory / name)]  # false of impossible names too
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(names)} shards: {', '.join(map(printable, missing))}"
        )
    shards, damaged = {}, []
    for name in names:
        try:
            shards[name] = tensor_files.read_header(directory / name)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("; ".join(damaged))
    lists = {name: {key for key, shard in weight_map.items() if shard == name} for name in names}
    absent = {name: _needed(key for key in lists[name] if key not in shards[name]) for name in names}
    problems = [f"{name} lacks {shapes.fold(keys)}" for name, keys in absent.items() if keys]
    unlisted = _needed(key for name in names for key in shards[name] if key not in lists[name])
    problems += [f"the index does not list {shapes.fold(unlisted)}"] if unlisted else []
    if problems:
        raise CheckpointError(f"{index} contradicts the shards: {'; '.join(problems)}")
    return {key: tensor for name in names for key, tensor in shards[name].items()}


def _needed(keys: Iterable[str]) -> list[str]:
    """The keys that an index must have right: tied heads are listed and not written, unused tensors mean nothing."""
    return sorted(key for key in keys if canonical(key) != _HEAD and not UNUSED.search(canonical(key)))


def read(contents: Contents, dtype: np.dtype | None, progress: bool, emit: Callable[[str, Any], None]) -> None:
    """Read a whole checkpoint, each tensor once.

    Args:
      contents: from `scan`.
      dtype: of plain parameters, and of the numbers that quantized ones stand for; None keeps each tensor's own.
      progress: report a slow load on stderr.
      emit: called with the path and the host array of each parameter, or the weight of host arrays, by several threads.
    Raises:
      CheckpointError: a file has become shorter, or float16 cannot hold a value.
    """
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    label = f"loading {contents.directory.name}"
    with files.progress(label, total, progress) as advance, ThreadPoolExecutor(_READERS) as pool:

        def read_one(path: str) -> None:
            tensor = contents.tensors[path]
            if isinstance(tensor, QuantizedTensor):
                emit(path, tensor.read(path, dtype or np.dtype(ml_dtypes.bfloat16), advance))
            else:
                emit(path, tensor_files.read(tensor, dtype, advance))

        # The largest first: what it takes to quantize them is gone before the others fill the memory.
        paths = sorted(contents.tensors, key=lambda path: -contents.tensors[path].nbytes)
        list(pool.map(read_one, paths))


def require_no_adapter(directory: Path) -> None:
    """CheckpointError when what is written into a directory would be passed by: it is read as an adapter."""
    if (directory / adapter_config.NAME).is_file():
        remedy = "give another directory"
        raise CheckpointError(f"{directory} holds {adapter_config.NAME}, a model in it would not be loaded: {remedy}")


def save(
    directory: Path,
    config: PaliGemmaConfig,
    params: Mapping[str, Any],
    dtype: str | None = None,
    max_shard_bytes: int = 2_000_000_000,
    processor_from: Sequence[Path] = (),
) -> None:
    """Write config.json and weights in layout A, each file whole or not at all; config.json comes last.

    Args:
      directory: made when absent; weights of an earlier save are replaced.
      config: geometry; `params` must have exactly its shapes, projections of one input fused (`fusion`) or not.
      params: parameter tree of numpy or JAX arrays; those that are cast or on an accelerator are copied to host memory,
        a file at a time.
      dtype: to cast to; None keeps each array's own.
      max_shard_bytes: weights beyond this go to several files with an index; one tensor is never split.
      processor_from: directories whose tokenizer, processor and mask VQ-VAE are copied along; the first counts most.
    Raises:
      CheckpointError: the parameters are not those of the geometry, or the directory is an adapter's.
    """
    require_no_adapter(directory)
    target = dtype_named(dtype) if dtype else None
    leaves = {path: ops.unprepare(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    found = {path: leaf.shape for path, leaf in leaves.items()}
    shapes.require(found, fusion.fused_shapes(config, found.__contains__))
    expected, is_quantized = shapes.expected_shapes(config), functools.partial(_is_quantized, leaves)
    tensors: dict[str, Any] = {}
    uncast: set[str] = set()
    for path in fusion.fused_shapes(config, is_quantized):
        leaf = fusion.take(leaves, path, expected)
        parts = quantized.tensors_of(key_of(path, config.version), leaf)
        tensors |= parts
        uncast |= set(parts) if hasattr(leaf, "quantization") else set()
    sizes = {
        key: array.size * (array.dtype if target is None or key in uncast else target).itemsize
        for key, array in tensors.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character
        problem = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"{directory} cannot be made ({problem}): name another directory") from None
    for name, keys in zip(names, shards, strict=True):
        tensor_files.write(directory / name, {key: tensors[key] for key in keys}, target, uncast)
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        files.write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    for old in (directory / INDEX, directory / SINGLE, *directory.glob("model-?????-of-?????.safetensors")):
        if old.name not in (*names, *((INDEX,) if count > 1 else ())):
            old.unlink(missing_ok=True)
    companions.copy(processor_from, directory)
    companions.write_eos(directory, config)
    stored = target or Counter(leaf.dtype for leaf in leaves.values()).most_common(1)[0][0]
    bits = min((leaf.quantization for leaf in leaves.values() if hasattr(leaf, "quantization")), default=None)
    files.write_json(directory / CONFIG, config_json.to_json(config, stored.name, bits))


def _is_quantized(leaves: Mapping[str, Any], fused: str) -> bool:
    """Whether a fused weight, or all of its parts in the same way, are quantized."""
    if fused in leaves:
        return hasattr(leaves[fused], "quantization")
    parts = [leaves[part] for part in fusion.group_of(fused).parts]
    kinds = {(jax.tree.structure(part), *(array.dtype for array in jax.tree.leaves(part))) for part in parts}
    return all(hasattr(part, "quantization") for part in parts) and len(kinds) == 1


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Keys of each file, whose bytes stay within the limit.

    Of several files the last have what would displace others from their alignment: biases of odd sizes.
    """
    if sum(sizes.values()) <= limit:
        return [list(sizes)]
    groups: list[list[str]] = []
    for odd in (False, True):
        room = 0
        for key in (key for key, size in sizes.items() if (size % ALIGNMENT > 0) == odd):
            if sizes[key] > room:
                groups.append([])
                room = max(limit, sizes[key])
            groups[-1].append(key)
            room -= sizes[key]
    return groups
