"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

Axes: F outputs, D inputs (of an embedding F rows and D width), r rank.
Source: peft 0.21, tuners/lora/config.py, utils/save_and_load.py
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax import files
from paligemma_jax.checkpoints import adapter_config, adapter_targets, adapters, tensor_files
from paligemma_jax.checkpoints.adapter_targets import TABLE
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, one_line

_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change of one weight.

    left: [F, r], PEFT's lora_B; right: [r, D], its lora_A; of an embedding lora_embedding_A and _B, transposed.
    magnitude: DoRA's [F], or None.
    """

    left: Any
    right: Any
    magnitude: Any = None


def save(
    directory: Path,
    config: PaliGemmaConfig,
    changes: Mapping[str, LowRank],
    whole: Mapping[str, Any],
    *,
    rank: int,
    alpha: float,
    use_rslora: bool,
    base: str,
) -> None:
    """Write an adapter, float32, its modules named as in transformers 5; each file whole, the config last.

    Args:
      directory: made when absent.
      config: geometry of the base.
      changes: by the path of the weight.
      whole: parameters that replace the base's, by path: all of a module (`modules_to_save`).
      base: path or hub id of the base.

    Raises:
      CheckpointError: the directory cannot be made or written.
    """
    naming = adapter_targets.current_naming(config)
    tensors: dict[str, Any] = {}
    for path, change in changes.items():
        module = _PREFIX + _module(naming[path])
        if path == TABLE:
            parts = {".lora_embedding_A": np.asarray(change.left).T, ".lora_embedding_B": np.asarray(change.right).T}
            if config.text.tied:  # PEFT has the same numbers once more, for the head
                head = {".lora_A.weight": change.right, ".lora_B.weight": change.left}
                tensors |= {f"{_PREFIX}lm_head{name}": np.asarray(part, np.float32) for name, part in head.items()}
        else:
            parts = {".lora_A.weight": change.right, ".lora_B.weight": change.left}
        if change.magnitude is not None:
            parts[".lora_magnitude_vector"] = change.magnitude
        tensors |= {module + name: np.ascontiguousarray(part, np.float32) for name, part in parts.items()}
    tensors |= {_PREFIX + naming[path]: np.asarray(array, np.float32) for path, array in whole.items()}
    value = {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": list(dict.fromkeys(_module(naming[path]) for path in whole)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": [_module(naming[path]) for path in changes],
        "task_type": None,
        "use_dora": any(change.magnitude is not None for change in changes.values()),
        "use_rslora": use_rslora,
    }
    if config.text.tied and TABLE in {*changes, *whole}:  # else PEFT changes the embedding alone
        value["ensure_weight_tying"] = True
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made ({one_line(error)}): name another directory") from None
    tensor_files.write(directory / adapters.WEIGHTS, tensors)
    files.write_json(directory / adapter_config.NAME, value)


def _module(name: str) -> str:
    """The module of a parameter: "lm_head.weight" -> "lm_head"."""
    return name.rpartition(".")[0]
