"""Which modules adapter_config.json says that a PEFT adapter has, as paths of our parameters.

PEFT matches the names that modules had in the transformers of the day: suffixes or whole names in a list, or one
pattern of the whole name. Which transformers that was is not said: every naming is tried, and the one that explains
most of what the file holds counts.

Source: peft 0.21, tuners/tuners_utils.py (check_target_module_exists, _maybe_include_all_linear_layers)
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping

from paligemma_jax.checkpoints import huggingface, shapes
from paligemma_jax.checkpoints.adapter_config import AdapterConfig
from paligemma_jax.config import PaliGemmaConfig

TABLE, HEAD = "language_model/embed_tokens/weight", "language_model/lm_head/weight"
_TEXTS = (  # what replaces layout A's "language_model.model", its head's name (None: it has no head), and what is first
    ("language_model.model", "language_model.lm_head", ""),  # as on the hub, and before transformers 4.52
    ("language_model", "lm_head", "model."),
    ("language_model", None, ""),  # the model without its head
)
_TEXT_NOW = _TEXTS[1]
_VISIONS = ("vision_tower.vision_model", "vision_tower")  # before transformers 5, and since
_HEADLESS = re.compile(r"(base_model\.model\.)?language_model\.(layers|embed_tokens|norm)\.")
_LAYER = re.compile(r"layers_\d+")


def all_shapes(config: PaliGemmaConfig) -> dict[str, shapes.Shape]:
    """Path -> shape of every parameter that an adapter may change: the head too where it is tied."""
    return shapes.expected_shapes(dataclasses.replace(config, text=dataclasses.replace(config.text, tied=False)))


def namings(config: PaliGemmaConfig) -> list[dict[str, str]]:
    """Path of a parameter -> name of it in transformers ("lm_head.weight"), in each naming that it has had."""
    keys = {path: huggingface.key_of(path, config.version) for path in all_shapes(config)}
    found = []
    for (text, head, first), vision in itertools.product(_TEXTS, _VISIONS):
        names = {}
        for path, key in keys.items():
            if path != HEAD:
                key = key.replace("language_model.model", text).replace("vision_tower.vision_model", vision)
                names[path] = first + key
            elif head is not None:
                names[path] = f"{head}.weight"
        found.append(names)
    return found


def current_naming(config: PaliGemmaConfig) -> dict[str, str]:
    """Path of a parameter -> name of it in transformers 5."""
    return namings(config)[_TEXTS.index(_TEXT_NOW) * len(_VISIONS) + _VISIONS.index("vision_tower")]


def lacking(low_rank: Mapping[str, str], adapter: AdapterConfig, base: PaliGemmaConfig) -> list[str]:
    """Paths of the weights for which an adapter should have low-rank parts.

    Args:
      low_rank: path of each weight for which it has them -> name of one of them in the file.
    """
    if not adapter.target_modules:
        return []
    kinds = {path: shape for path, shape in all_shapes(base).items() if len(shape) > 1}  # those that PEFT has LoRA for
    missing, most = [], -1
    is_headless = any(map(_HEADLESS.match, low_rank.values()))
    for names in (names for names in namings(base) if HEAD in names or is_headless):
        modules = {path: names[path].removesuffix(".weight") for path in kinds if path in names}
        expected = [path for path, module in modules.items() if is_targeted(module, len(kinds[path]), adapter)]
        absent = [path for path in expected if path not in low_rank and not _is_tied(path, low_rank, adapter)]
        shared = len(expected) - len(absent)
        if expected and (shared > most or (shared == most and len(absent) < len(missing))):
            missing, most = absent, shared
    chosen = adapter.layers_to_transform or adapter.exclude_modules or re.search(r"\d", str(adapter.target_modules))
    if most < 0 and not chosen:  # names that are none of ours: no layer of a row may lack
        rows = {_LAYER.sub("*", path) for path in low_rank}
        missing = [path for path in kinds if path not in low_rank and _LAYER.sub("*", path) in rows]
    return missing


def lacking_saved(whole: Collection[str], module: str, adapter: AdapterConfig, base: PaliGemmaConfig) -> list[str]:
    """Paths of the parameters of a module of `modules_to_save` that are not there whole."""
    one, known = dataclasses.replace(adapter, modules_to_save=(module,)), namings(base)
    named = [path for path in known[0] if all(one.saves(names[path]) for names in known if path in names)]
    return [path for path in named if path not in whole and not _is_tied(path, whole, adapter)]


def _is_tied(path: str, found: Collection[str], adapter: AdapterConfig) -> bool:
    """Whether a table is that of the other name, which is there."""
    other: Mapping[str, str] = {TABLE: HEAD, HEAD: TABLE}
    return adapter.ensure_weight_tying and other.get(path) in found


def is_targeted(module: str, num_axes: int, adapter: AdapterConfig) -> bool:
    """Whether PEFT puts low-rank parts beside a module; its weight has so many axes."""
    targets, excluded, layers = adapter.target_modules, adapter.exclude_modules, adapter.layers_to_transform
    if _matches(excluded, module) or adapter.saves(module):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return num_axes == 2 and not re.search(r"(embed_tokens|position_embedding|lm_head)$", module)
    if not _matches(targets, module):
        return False
    if isinstance(targets, str) or module in targets or not layers:
        return True
    for pattern in adapter.layers_pattern or (r"[^.]*",):
        if match := re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", module):
            return int(match[match.lastindex]) in layers
    return False


def _matches(names: str | frozenset[str], module: str) -> bool:
    """Whether a pattern is one of the name, or a list has it or a suffix of it."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    parts = module.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
