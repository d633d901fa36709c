"""LoRA and DoRA: which weights get an adapter, its first values, and what becomes of it at the end.

Axes: F outputs, D inputs, r rank, V rows of the embedding table.
"""

import dataclasses
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax import checkpoints, ops
from paligemma_jax.checkpoints import adapter_saving, low_rank
from paligemma_jax.checkpoints.adapter_saving import LowRank
from paligemma_jax.checkpoints.adapter_targets import TABLE
from paligemma_jax.checkpoints.arrays import cast, dtype_named
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.training.trainable import Names, Tree, matching, patterns_of

_DECODER = re.compile(r"language_model/layers_\d+/.*_proj/weight")
_LINEAR = re.compile(
    rf"{_DECODER.pattern}|vision_tower/layers_\d+/.*(_proj|fc\d)/weight|multi_modal_projector/linear/weight"
)
_LOOKED_UP = re.compile(r"language_model/(embed_tokens|lm_head)/weight")
_TARGETS = {"decoder": _DECODER, "all": _LINEAR}
_PARTS = ("up", "down", "magnitude")  # in the order of the fields of `LowRank`


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Of all adapters of a run; targets: "decoder", "all" (every linear layer) or patterns (`trainable`)."""

    rank: int = 8
    alpha: float = 16.0
    targets: str = "decoder"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora_rank={self.rank} is not possible: give an integer of at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora_alpha={self.alpha} is not possible: give a number above 0")
        if not patterns_of(self.targets):
            raise ConfigError("lora_targets is empty: give decoder, all, or patterns of names")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def target_paths(settings: LoraSettings, names: Names, frozen: Iterable[str] = ()) -> list[str]:
    """Paths of the weights that get an adapter, less those that are to stay frozen.

    Raises:
      ConfigError: a pattern means nothing that can have one, or nothing is left.
    """
    able = [path for path in names if _LINEAR.fullmatch(path) or _LOOKED_UP.fullmatch(path)]
    if settings.targets in _TARGETS:
        found = {path for path in able if _TARGETS[settings.targets].fullmatch(path)}
    else:
        found = set()
        for pattern in patterns_of(settings.targets):
            meant = matching(pattern, names)
            fitting = set(meant).intersection(able)
            if not fitting:
                raise ConfigError(
                    f"lora_targets: {pattern!r} means {meant[0]} alone, and only linear layers and the embedding table "
                    "have adapters, no convolution, norm or bias: name it in trainable, to train it whole"
                )
            found |= fitting
    found = [path for path in able if path in found.difference(frozen)]
    if not found:
        raise ConfigError(f"lora_targets={settings.targets!r} leaves nothing that freeze does not name: change one")
    if settings.use_dora and TABLE in found:
        raise ConfigError("use_dora=True is for linear layers: leave embed_tokens out of lora_targets")
    return found


def describe(paths: Iterable[str]) -> str:
    """How many weights of each kind there are: "decoder: 2 q_proj, 2 up_proj; projector: 1 linear"."""
    parts = {"language_model": "decoder", "vision_tower": "image encoder", "multi_modal_projector": "projector"}
    counts: dict[str, Counter[str]] = {}
    for path in paths:
        first, *_, module, _ = path.split("/")
        counts.setdefault(parts[first], Counter())[module] += 1
    kinds = {part: ", ".join(f"{n} {module}" for module, n in found.items()) for part, found in counts.items()}
    return "; ".join(f"{part}: {text}" for part, text in kinds.items())


def init_adapters(params: Tree, paths: Iterable[str], settings: LoraSettings, seed: int) -> Tree:
    """PEFT's first values, which change nothing: A uniform within 1 / sqrt(D), B zero, magnitudes the rows' norms.

    Of the embedding table it is B that is drawn, from a normal distribution. Each weight's draw depends on its path and
    the seed alone.

    Returns:
      {"down": f32 [r, D], "up": f32 [F, r]} and perhaps "magnitude" [F] in place of each weight, nested as `params`.
    """
    flat = flatten_dict(params, sep="/")
    found: dict[str, jax.Array] = {}
    for path in paths:
        num_outputs, width = flat[path].shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        if path == TABLE:
            down = jax.random.normal(key, (settings.rank, width))
        else:
            bound = 1 / math.sqrt(width)
            down = jax.random.uniform(key, (settings.rank, width), minval=-bound, maxval=bound)
        found[f"{path}/down"], found[f"{path}/up"] = down, jnp.zeros((num_outputs, settings.rank))
        if settings.use_dora:
            norms = jax.jit(ops.row_norms)(flat[path], down, found[f"{path}/up"], settings.scale)
            found[f"{path}/magnitude"] = jax.block_until_ready(norms)  # programs that overlap hang several processes
    return unflatten_dict(found, sep="/")


def changes_of(trained: Tree) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """What a training has made: the changes of weights with adapters, and the parameters that trained whole."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(trained, sep="/").items()}
    paths = [path.removesuffix("/down") for path in flat if path.endswith("/down")]
    changes = {path: LowRank(*(flat.pop(f"{path}/{part}", None) for part in _PARTS)) for path in paths}
    return changes, flat


def merge(checkpoint: str | Path, trained: Tree, settings: LoraSettings, dtype: str) -> dict[str, Any]:
    """The weights of a checkpoint with what was trained, as plain arrays of `dtype` in host memory.

    They are read again, with the precision of the file: what comes out is, bit for bit, what loading the checkpoint
    with the adapter that `save` writes gives. Weights that are quantized in the file are dequantized first.
    """
    contents, target = checkpoints.scan(checkpoints.locate(checkpoint)), dtype_named(dtype)
    _, params = checkpoints.load(contents, None, place=lambda path, leaf: leaf)
    changes, whole = changes_of(trained)
    merged = {}
    for path, leaf in flatten_dict(ops.unprepare(params), sep="/").items():
        if ops.is_weight(leaf):
            leaf = dataclasses.replace(jax.device_put(leaf), dtype=jnp.float32).dequantize()
        array = np.asarray(leaf)
        change = changes.get(path)
        if path in whole or change is None:
            merged[path] = cast(np.asarray(whole.get(path, array)), target, path)
        else:
            parts = (change.left, change.right, settings.scale, change.magnitude)
            merged[path] = low_rank.merge(array, *parts, dtype=target, name=path)
    return unflatten_dict(merged, sep="/")


def save(
    directory: Path, config: PaliGemmaConfig, trained: Tree, params: Tree, settings: LoraSettings, base: str
) -> None:
    """Write an adapter in PEFT's format; a module of which anything trained whole is saved whole, out of `params`."""
    changes, whole = changes_of(trained)
    modules = {path.rpartition("/")[0] for path in whole}
    rest: Mapping[str, Any] = flatten_dict(params, sep="/")
    whole = {path: leaf for path, leaf in rest.items() if path.rpartition("/")[0] in modules} | whole
    options = {"rank": settings.rank, "alpha": settings.alpha, "use_rslora": settings.use_rslora}
    adapter_saving.save(directory, config, changes, whole, **options, base=base)
