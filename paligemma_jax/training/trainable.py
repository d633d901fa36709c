"""Which parameters train: chosen by patterns, apart from those that stay as they are, to the bit.

A parameter has several names: our path ("language_model/layers_0/self_attn/q_proj/weight"), and those that it has had
in transformers and PEFT ("model.language_model.layers.0.self_attn.q_proj.weight"). A pattern that fits any of them,
with its last part or without, means the parameter. It is

- a name, or successive parts of one: "vision_tower", "q_proj", "language_model/norm", "layers.0.mlp"; or
- a glob of a whole name: "*/self_attn/*"; or
- a regular expression of a whole name, as PEFT's: ".*language_model.*\\.(q|v)_proj".
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax import ops
from paligemma_jax.checkpoints import adapter_targets, expected_shapes
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.sharding import path_name

Tree = Any
Names = Mapping[str, Collection[str]]  # path of a parameter -> all its names

_PLAIN = re.compile(r"[\w./-]+")
_LOW_RANK = ("down", "up", "magnitude")  # parts of an adapter, which stand in the tree below the path of their weight


def names_of(config: PaliGemmaConfig) -> dict[str, set[str]]:
    """All names of each parameter of a geometry."""
    namings = adapter_targets.namings(config)
    return {path: {path, *(names[path] for names in namings if path in names)} for path in expected_shapes(config)}


def matching(pattern: str, names: Names) -> list[str]:
    """The paths that a pattern means.

    Raises:
      ConfigError: there is none, or it is neither a name nor a glob nor a regular expression.
    """
    fits = _matcher(pattern)
    found = [path for path, known in names.items() if any(fits(name) or fits(_module(name)) for name in known)]
    if not found:
        parts = {part for known in names.values() for name in known for part in (name, _module(name), *_parts(name))}
        close = difflib.get_close_matches(pattern, sorted(parts), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give a name, a glob or a regular expression"
        raise ConfigError(f"the pattern {pattern!r} matches no parameter: {hint}")
    return found


def patterns_of(text: str) -> list[str]:
    """The patterns of a config key, which stand apart by spaces or semicolons."""
    return [pattern for pattern in re.split(r"[;\s]+", text) if pattern]


def matching_any(text: str, names: Names) -> set[str]:
    """The paths that the patterns of a text mean; ConfigError as of `matching`, for each of them."""
    return {path for pattern in patterns_of(text) for path in matching(pattern, names)}


def _matcher(pattern: str) -> Callable[[str], bool]:
    if _PLAIN.fullmatch(pattern):
        wanted = _parts(pattern)

        def has(name: str) -> bool:
            parts = _parts(name)
            return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts) - len(wanted) + 1))

        return has
    glob = re.compile(fnmatch.translate(pattern))
    try:
        regex = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        regex = glob
    return lambda name: bool(glob.fullmatch(name) or regex.fullmatch(name))


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _module(name: str) -> str:
    """A name without its last part."""
    return re.sub(r"[./][^./]*$", "", name)


def labels(params: Tree, rules: Sequence[tuple[str, Any]], default: Any = None, names: Names | None = None) -> Tree:
    """A label for each leaf of what trains, such as a learning-rate multiplier: that of the first pattern it fits.

    Args:
      params: `TrainState.params`; parts of an adapter have the names of their weight.
      rules: pairs of a pattern and a label.
      default: of the leaves that fit none; None allows no such leaf.
      names: all names of the parameters (`names_of`); by default their paths alone.

    Raises:
      ConfigError: a pattern fits nothing that trains, or a leaf fits none; close names are given.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = {path: names[path] if names and path in names else {path} for path in dict.fromkeys(paths)}
    found: dict[str, Any] = {}
    for pattern, label in rules:
        found = dict.fromkeys(matching(pattern, known), label) | found
    if default is None and (lacking := [path for path in known if path not in found]):
        given = ", ".join(pattern for pattern, _ in rules)
        raise ConfigError(f"{lacking[0]} and {len(lacking) - 1} more parameters fit none of the patterns {given}")
    return jax.tree.unflatten(jax.tree.structure(params), [found.get(path, default) for path in paths])


def path_of(path: Sequence[Any]) -> str:
    """The path of the parameter that a leaf of a tree belongs to, from what `tree_leaves_with_path` says of it."""
    keys = path_name(tuple(path)).split("/")
    return "/".join(keys[:-1] if keys[-1] in _LOW_RANK else keys)


def split(params: Tree, trained: Iterable[str]) -> tuple[Tree, Tree]:
    """Parameters apart: those of the paths `trained` as float32, and the others as they are.

    Raises:
      ConfigError: one that is to train is quantized.
    """
    flat, trained = flatten_dict(params, sep="/"), set(trained)
    if quantized := sorted(path for path in trained if ops.is_weight(flat[path])):
        what = flat[quantized[0]].quantization
        raise ConfigError(f"{quantized[0]} is {what} and cannot train whole: freeze it, or give the original weights")
    moving = {path: leaf.astype(jnp.float32) for path, leaf in flat.items() if path in trained}
    rest = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(moving, sep="/"), unflatten_dict(rest, sep="/")


def join(trained: Tree, frozen: Tree, dtype: Any, scale: float = 1.0) -> Tree:
    """The parameters of the network: what trains as `dtype`, what does not, and `ops.Lora` where it has an adapter.

    Args:
      trained: nested dictionaries; the adapter of a weight is {"down", "up"} and perhaps "magnitude" in its place.
      frozen: nested dictionaries.
      scale: of all adapters.
    """
    if trained is None:
        return frozen
    if not isinstance(trained, dict):
        return trained.astype(dtype)
    if "down" in trained:
        return ops.Lora(frozen, **trained, scale=scale)
    frozen = {} if frozen is None else frozen
    return {name: join(trained.get(name), frozen.get(name), dtype, scale) for name in {**frozen, **trained}}
