"""adapter_config.json of a PEFT adapter: what of it is honoured, and what is refused by name.

Source: peft 0.21, tuners/lora/config.py.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from paligemma_jax import files
from paligemma_jax.errors import ConfigError, printable

NAME = "adapter_config.json"
_MERGE = "merge it in PEFT (merge_and_unload, then save_pretrained) and give the result"

# What changes nothing once an adapter is trained: how it was initialized, what was trained, where it came from.
_IMMATERIAL = {
    *("auto_mapping", "peft_version", "inference_mode", "task_type", "lora_dropout", "bias", "fan_in_fan_out"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "qalora_group_size", "velora_config", "ephemeral_gpu_offload"),
}
_HONOURED = {
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "ensure_weight_tying", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Other ways to initialize change the base too, which a saved adapter does not hold.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_MOST = 3e38  # that float32 holds


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself; the names are PEFT's."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool  # B has a bias
    ensure_weight_tying: bool
    modules_to_save: tuple[str, ...]
    target_modules: str | frozenset[str]  # a pattern of whole names, "all-linear", or names and suffixes of names
    exclude_modules: str | frozenset[str]
    layers_to_transform: tuple[int, ...]  # () is all
    layers_pattern: tuple[str, ...]
    base: str | None  # path or hub id of the base
    revision: str | None

    def rank(self, module: str) -> int:
        """r of a module, by its name in the adapter."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        """lora_alpha of a module, by its name in the adapter."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def saves(self, name: str) -> bool:
        """Whether `modules_to_save` names a module, or one that it is in, by any name of it or of a parameter of it."""
        return any(re.search(rf"(^|\.){re.escape(module)}(\.|$)", name) for module in self.modules_to_save)


def _by_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_config(directory: Path) -> AdapterConfig:
    """Read adapter_config.json of a directory.

    Raises:
      ConfigError: it is no LoRA adapter, or asks for what is not supported; the field is named.
    """
    path = directory / NAME
    value = files.read_json(path)

    def check(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{path}: {name} is {value.get(name)!r:.80}, expected {expected}")

    check(value.get("peft_type") == "LORA", "peft_type", f"'LORA': {_MERGE}")
    for name, setting in value.items():
        if name not in _HONOURED | _IMMATERIAL and setting and name != "megatron_config":
            raise ConfigError(f"{path}: {printable(name)} is {setting!r:.80}, which is not supported: {_MERGE}")
    init = value.get("init_lora_weights", True)
    check(
        any(init is known or (isinstance(init, str) and init == known) for known in _INITS),
        "init_lora_weights",
        f"one that leaves the base as it is: {_MERGE}, or convert it with path_initial_model_for_weight_conversion",
    )
    check(_is_rank(value.get("r", 8)), "r", "a positive integer")
    check(_is_number(value.get("lora_alpha", 8)), "lora_alpha", "a number")
    for name, right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        table = value.get(name) or {}
        check(isinstance(table, dict) and all(map(right, table.values())), name, "numbers by module names")
        check(all(map(_is_pattern, table)), name, "numbers by patterns that `re` understands")
    for name in ("use_rslora", "use_dora", "ensure_weight_tying", "lora_bias"):
        check(value.get(name) in (None, True, False), name, "true or false")
    saved = value.get("modules_to_save") or []
    check(
        isinstance(saved, list) and all(isinstance(name, str) for name in saved), "modules_to_save", "a list of names"
    )
    for name in ("base_model_name_or_path", "revision"):
        check(isinstance(value.get(name), str | None), name, "a text")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        check(_is_text_or_list(value.get(name)), name, "a pattern, or a list of names")
    for name in ("target_modules", "exclude_modules"):
        is_right = not isinstance(value.get(name), str) or _is_pattern(value[name], whole=True)
        check(is_right, name, "a pattern that `re` understands")
    patterns, layers = _as_tuple(value.get("layers_pattern")), _as_tuple(value.get("layers_to_transform"))
    check(all(map(_is_pattern, patterns)), "layers_pattern", "patterns that `re` understands")
    check(all(type(layer) is int for layer in layers), "layers_to_transform", "numbers of layers")
    return AdapterConfig(
        r=value.get("r", 8),
        lora_alpha=value.get("lora_alpha", 8),
        rank_pattern=value.get("rank_pattern") or {},
        alpha_pattern=value.get("alpha_pattern") or {},
        use_rslora=bool(value.get("use_rslora")),
        use_dora=bool(value.get("use_dora")),
        lora_bias=bool(value.get("lora_bias")),
        ensure_weight_tying=bool(value.get("ensure_weight_tying")),
        modules_to_save=tuple(saved),
        target_modules=_names(value.get("target_modules")),
        exclude_modules=_names(value.get("exclude_modules")),
        layers_to_transform=layers,
        layers_pattern=patterns,
        base=value.get("base_model_name_or_path") or None,
        revision=value.get("revision") or None,
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """A list, or what stands for a list of one."""
    return tuple(value) if isinstance(value, list) else () if value in (None, "") else (value,)


def _names(value: str | list[str] | None) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value or ())


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST


_NESTED = re.compile(r"(?<!\\)[*+}][^()]*\)+[*+{]|(\.[*+]){3}|(\.[*+][^()]{0,20}){6}")


def _is_pattern(text: str, whole: bool = False) -> bool:
    """Whether `re` understands a text: as a part of a pattern, or as a whole one, which may begin with flags.

    Repetitions of what repeats itself are refused: to find that one does not match can take for ever.
    """
    if _NESTED.search(text):
        return False
    try:
        re.compile(text if whole else f".({text})")
    except (re.error, OverflowError, RecursionError):
        return False
    return True
