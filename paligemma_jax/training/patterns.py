"""Parameters named by patterns, such as those that learn more slowly or decay."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from paligemma_jax.errors import ConfigError

_PLAIN = re.compile(r"[\w./-]+")


def split(text: str) -> list[str]:
    """The patterns of a config key, which stand apart by spaces or semicolons."""
    return [pattern for pattern in re.split(r"[;\s]+", text) if pattern]


def multipliers(key: str, text: str) -> list[tuple[str, float]]:
    """Patterns with a number each, "one=0.1 ; two=1"; ConfigError when one is not so, or not above 0."""
    rules = []
    for part in split(text):
        pattern, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not pattern or not 0 < value < float("inf"):
            raise ConfigError(f"{key}: {part!r} is not possible: give PATTERN=NUMBER with a number above 0")
        rules.append((pattern, value))
    return rules


def labels(params: Any, rules: Sequence[tuple[str, Any]], default: Any = None) -> Any:
    """A label for each leaf of what trains: that of the first pattern that fits its path, else the default.

    A pattern is successive parts of a path ("vision_tower", "norm/weight") or a regular expression of a whole one.

    Raises:
      ConfigError: a pattern fits no leaf, or a leaf fits none and there is no default.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found: dict[str, Any] = {}
    for pattern, label in rules:
        fits = _matcher(pattern)
        if not (matched := [path for path in paths if fits(path)]):
            raise ConfigError(f"the pattern {pattern!r} matches no parameter that trains, such as {paths[0]}")
        found = dict.fromkeys(matched, label) | found
    if default is None and (lacking := [path for path in paths if path not in found]):
        given = ", ".join(pattern for pattern, _ in rules)
        raise ConfigError(f"{lacking[0]} and {len(lacking) - 1} more parameters fit none of the patterns {given}")
    return jax.tree.unflatten(jax.tree.structure(params), [found.get(path, default) for path in paths])


def path_of(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _matcher(pattern: str) -> Callable[[str], bool]:
    if _PLAIN.fullmatch(pattern):
        return lambda path: f"/{pattern.replace('.', '/')}/" in f"/{path}/"
    try:
        return lambda path, regex=re.compile(pattern): regex.fullmatch(path) is not None
    except re.error as error:
        raise ConfigError(f"{pattern!r} is neither a name nor a regular expression ({error})") from None
