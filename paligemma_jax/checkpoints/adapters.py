"""PEFT adapters (LoRA), merged into their base while it is read: W + scale * B A in float32, rounded once.

An adapter is a directory with adapter_config.json and adapter_model.safetensors. Names of modules are those that
transformers had when it was written; they are read as those of checkpoints are. What an adapter asks for and is not
known here is refused by name.

Axes: F outputs, D inputs (of an embedding F rows and D width), r rank.
Source: peft 0.21, tuners/lora/{config,layer,dora}.py, utils/save_and_load.py
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.checkpoints import adapter_targets, big_vision, foreign, huggingface, low_rank, shapes, tensor_files
from paligemma_jax.checkpoints.adapter_config import AdapterConfig, read_config
from paligemma_jax.checkpoints.adapter_targets import HEAD, TABLE
from paligemma_jax.checkpoints.arrays import cast_into, empty_aligned
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.\w+$)")
_MOST_LETTERS = 400  # of the problems of one kind

Base = huggingface.Contents | big_vision.Contents


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of one parameter; each field is None where the adapter has no such part.

    whole: replaces it, before the rest.
    left, right: tensors whose product [F, r] [r, D] times `scale` is added. Of an embedding they lie transposed.
    magnitude: DoRA's norms of what then are the rows, of an embedding the columns.
    bias: is added to a bias, times `scale`.
    """

    whole: tensor_files.Tensor | None = None
    left: tensor_files.Tensor | None = None
    right: tensor_files.Tensor | None = None
    magnitude: tensor_files.Tensor | None = None
    bias: tensor_files.Tensor | None = None
    is_embedding: bool = False
    scale: float = 1.0

    def apply(self, array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
        """A parameter with the change, as `dtype`; sums are float32, and rounded once."""
        if self.whole is not None:
            array = tensor_files.read(self.whole)
        if self.left is not None:
            left, right = tensor_files.read(self.left), tensor_files.read(self.right)
            left, right = (left.T, right.T) if self.is_embedding else (left, right)
            magnitude = None if self.magnitude is None else tensor_files.read(self.magnitude)
            return low_rank.merge(array, left, right, self.scale, magnitude, self.is_embedding, dtype, name)
        out = empty_aligned(array.shape, dtype)
        if self.bias is not None:
            bias = np.asarray(tensor_files.read(self.bias), np.float32)
            array = np.asarray(array, np.float32) + np.float32(self.scale) * bias
        cast_into(out, array, name)
        return out


@dataclasses.dataclass(frozen=True)
class Contents:
    """A verified base and a verified adapter over it, of which no tensor was read yet."""

    base: Base
    directory: Path
    config: PaliGemmaConfig
    changes: dict[str, Change]  # path of a parameter -> what becomes of it

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors of the base have each dtype."""
        return dict(self.base.dtypes)

    @property
    def quantization(self) -> None:
        """A quantized base takes no adapter."""
        return None

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return *self.base.weight_files, self.directory / WEIGHTS

    @property
    def notes(self) -> tuple[str, ...]:
        return self.base.notes


def scan(directory: Path, base: Base) -> Contents:
    """Verify an adapter against its base, reading no tensor.

    Raises:
      ConfigError: adapter_config.json cannot be honoured.
      CheckpointError: weights that are missing, pickled, damaged, or fit no layer of the base.
    """
    config = read_config(directory)
    if base.quantization is not None:
        remedy = "merge it into the original weights first: paligemma-jax-convert BASE OUT --adapter DIR"
        raise CheckpointError(f"{directory}: an adapter cannot go over {base.quantization} weights: {remedy}")
    if not (directory / WEIGHTS).is_file():
        remedy = f"expected {WEIGHTS}"
        if (directory / PICKLED).is_file():
            remedy = f"{PICKLED} is pickled and not read: load it in PEFT and write it with save_pretrained(DIR)"
        raise CheckpointError(f"{directory} holds no adapter weights: {remedy}")
    headers = tensor_files.read_header(directory / WEIGHTS)
    foreign.check_tensors(headers, directory)
    parts, unknown = _sort(headers, base.config)
    problems = [f"{len(unknown)} tensors fit no layer of it: {text}" for text in _short(unknown)]
    changes: dict[str, Change] = {}
    odd = []
    for path, found in parts.items():
        try:
            changes |= {path: _change(found, config)}
        except CheckpointError as error:
            odd.append(str(error))
    problems += _short(odd)
    problems += _lacking(parts, config, base.config)
    if not parts and not unknown:
        problems.append("it holds no tensors")
    _require_none(problems, directory, base)
    return _fit(directory, base, changes, config)


def _short(problems: list[str]) -> list[str]:
    """The same of all layers as one, and not all of many."""
    text = shapes.fold(problems)
    if len(text) > _MOST_LETTERS:
        text = f"{text[:_MOST_LETTERS]} ... ({len(problems)} in all)"
    return [text] if problems else []


def _require_none(problems: list[str], directory: Path, base: Base) -> None:
    if problems:
        name = base.directory if isinstance(base, huggingface.Contents) else base.path
        remedy = "give the base that it was trained on, or merge it in PEFT"
        raise CheckpointError(f"{directory} is no adapter of {name} that can be read: {'; '.join(problems)}: {remedy}")


def _sort(
    tensors: dict[str, tensor_files.Tensor], config: PaliGemmaConfig
) -> tuple[dict[str, dict[str, tensor_files.Tensor]], list[str]]:
    """Tensors by the path of the parameter that they change and by their part in it; names that fit none."""
    paths = {huggingface.key_of(path, config.version): path for path in adapter_targets.all_shapes(config)}
    found: dict[str, dict[str, tensor_files.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        match = _LOW_RANK.fullmatch(name)
        leaf, part = "weight", match["part"] if match else "whole"
        if match and match["leaf"] == "bias":
            leaf, part = "bias", "bias"
        full = huggingface.canonical(f"{match['module']}.{leaf}" if match else _WRAPPERS.sub("", name))
        if huggingface.UNUSED.search(full) or ".original_module." in full:
            continue
        if full in paths:
            found.setdefault(paths[full], {})[part] = tensor
        else:
            unknown.append(key)
    return found, unknown


def _change(parts: dict[str, tensor_files.Tensor], config: AdapterConfig) -> Change:
    """The change that some tensors make; CheckpointError when they do not belong together."""
    whole = parts.get("whole")
    odd = [tensor for tensor in parts.values() if tensor.dtype not in tensor_files.FLOATS]
    if odd:
        raise CheckpointError(f"{odd[0].name} is {odd[0].dtype}, only F32, F16 and BF16 are read")
    if "bias" in parts:
        return Change(whole, bias=parts["bias"], scale=_scale(parts["bias"], None, config))
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    down, up = (parts.get(name) for name in names)
    magnitude = parts.get("lora_magnitude_vector")
    if down is None and up is None and magnitude is None:
        return Change(whole)
    some = next(tensor for tensor in (down, up, magnitude) if tensor is not None)
    if down is None or up is None:
        raise CheckpointError(f"{some.name} has no {names[down is not None]} beside it")
    if config.use_dora != (magnitude is not None):
        has = "no" if magnitude is None else "a"
        raise CheckpointError(f"use_dora is {config.use_dora}, but {down.name} has {has} magnitude vector beside it")
    scale = _scale(down, down.shape[0] if down.shape else 0, config)
    left, right = (down, up) if is_embedding else (up, down)
    return Change(whole, left, right, magnitude, None, is_embedding, scale)


def _scale(tensor: tensor_files.Tensor, rank: int | None, config: AdapterConfig) -> float:
    """Factor of a module's product; the rank must be what adapter_config.json says, None takes that."""
    module = _LOW_RANK.fullmatch(tensor.name.removeprefix("base_model.model."))["module"]
    stated = config.rank(module)
    if rank not in (None, stated):
        raise CheckpointError(f"{tensor.name} has rank {rank}, adapter_config.json says {stated}")
    return config.alpha(module) / (math.sqrt(stated) if config.use_rslora else stated)


def _lacking(
    parts: dict[str, dict[str, tensor_files.Tensor]], config: AdapterConfig, base: PaliGemmaConfig
) -> list[str]:
    """What adapter_config.json promises and the file has not: low-rank parts of modules, and modules that are saved."""
    low_rank = {path: t.name for path, found in parts.items() for part, t in found.items() if part.startswith("lora_")}
    whole = {path for path, found in parts.items() if "whole" in found}
    problems = [
        f"it lacks {text}, which target_modules names"
        for text in _short(adapter_targets.lacking(low_rank, config, base))
    ]
    biases = {path.replace("/weight", "/bias") for path in low_rank if config.lora_bias}
    absent = [path for path in shapes.expected_shapes(base) if path in biases and "bias" not in parts.get(path, {})]
    problems += [f"lora_bias is True, but it lacks {text}" for text in _short(absent)]
    for module in config.modules_to_save:
        absent = adapter_targets.lacking_saved(whole, module, config, base)
        problems += [f"it lacks {module}, which modules_to_save names: {text}" for text in _short(absent)]
    return problems


def _fit(directory: Path, base: Base, changes: dict[str, Change], config: AdapterConfig) -> Contents:
    """Untie the head where only one of the two changes, and check every shape."""
    text = base.config.text
    if text.tied:
        changes, tied = _tables(changes, config)
        text = dataclasses.replace(text, tied=tied)
    if TABLE in changes and (whole := changes[TABLE].whole) is not None and len(whole.shape) == 2:
        text = dataclasses.replace(text, vocab_size=whole.shape[0])  # tokens were added to the base
    fitted = dataclasses.replace(base.config, text=text)
    expected, rows = shapes.expected_shapes(fitted), base.config.text.vocab_size
    short = [path for path in (TABLE, HEAD) if path in expected and changes.get(path, Change()).whole is None]
    problems = [f"{path} has {rows} rows, not {text.vocab_size}" for path in short if rows != text.vocab_size]
    problems += [f"the base has no {path}" for path in changes if path not in expected]
    problems += _short(
        [text for path in changes if path in expected for text in _misfits(changes[path], expected[path])]
    )
    needed = max(base.config.image_token_id, 1 + max(base.config.eos_token_ids))
    if text.vocab_size < min(rows, needed):
        problems.append(f"{changes[TABLE].whole.name} has {text.vocab_size} rows, the tokenizer {needed} ids")
    _require_none(problems, directory, base)
    return Contents(base, directory, fitted, changes)


def _tables(changes: dict[str, Change], config: AdapterConfig) -> tuple[dict[str, Change], bool]:
    """Changes over a tied base, and whether it stays tied.

    PEFT changes the embedding or the head alone, unless told to tie them; but what it writes into the base's own table,
    as when rows were added, is in both.
    """
    rest = {path: change for path, change in changes.items() if path not in (TABLE, HEAD)}
    if config.ensure_weight_tying:
        shared = changes.get(TABLE, changes.get(HEAD))
        return rest | ({TABLE: shared} if shared else {}), True
    pair = {path: changes.get(path, Change()) for path in (TABLE, HEAD)}
    saved = {path: config.saves(path.split("/")[1]) for path in pair}
    in_place = [change.whole for path, change in pair.items() if change.whole is not None and not saved[path]]
    shared = in_place[0] if in_place else None
    pair = {path: c if saved[path] else dataclasses.replace(c, whole=shared) for path, c in pair.items()}
    if pair[TABLE] == pair[HEAD]:
        del pair[HEAD]
    return rest | {path: change for path, change in pair.items() if change != Change()}, HEAD not in pair


def _misfits(change: Change, shape: tuple[int, ...]) -> list[str]:
    """The tensors of a change that do not fit a parameter of a shape."""
    ones = (1,) * (len(shape) - 2)  # a convolution's kernel, whose low-rank parts are convolutions
    num_outputs, width = shape[0], shape[-1]
    if change.is_embedding:
        rank = change.left.shape[0]
        left, right, magnitude = (rank, num_outputs), (width, rank), (width,)
    else:
        rank = change.right.shape[0] if change.right is not None else 0
        left, right = (num_outputs, rank, *ones), (rank, *shape[1:])
        magnitude = (1, num_outputs, *ones) if ones else (num_outputs,)
    wanted = ((change.whole, shape), (change.bias, shape), (change.left, left), (change.right, right))
    return [
        f"{tensor.name} is {list(tensor.shape)} instead of {list(size)}"
        for tensor, size in (*wanted, (change.magnitude, magnitude))
        if tensor is not None and tensor.shape != size
    ]


def read(contents: Contents, dtype: np.dtype | None, progress: bool, emit: Callable[[str, Any], None]) -> None:
    """Read the base with the adapter merged, a tensor at a time; arguments as for `huggingface.read`."""
    split = contents.base.config.text.tied and not contents.config.text.tied

    def merged(path: str, array: np.ndarray) -> None:
        for target in (TABLE, HEAD) if path == TABLE and split else (path,):
            change, kind = contents.changes.get(target, Change()), dtype or array.dtype
            same = change == Change() and array.dtype == kind
            emit(target, array if same else change.apply(array, kind, target))

    read_base = huggingface.read if isinstance(contents.base, huggingface.Contents) else big_vision.read
    read_base(contents.base, None, progress, merged)
