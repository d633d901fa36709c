"""The ways to fine-tune: what is loaded, what of it trains, and what is written at the end.

| method | trains | base |
|---|---|---|
| full | everything | - |
| decoder | the language model | - |
| lora | adapters, by default of the decoder's projections | as it is |
| qlora | the same | in 4 or 8 bits |
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from paligemma_jax import checkpoints, ops
from paligemma_jax.api import PaliGemma
from paligemma_jax.checkpoints.arrays import dtype_named
from paligemma_jax.checkpoints.shapes import parameter_count
from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded
from paligemma_jax.loading import load
from paligemma_jax.training import adapters
from paligemma_jax.training.adapters import LoraSettings
from paligemma_jax.training.trainable import Tree, join, matching_any, names_of, split

LEARNING_RATES = {"full": 1e-5, "decoder": 1e-5, "lora": 1e-4, "qlora": 1e-4}  # where none is given
ADAPTER = "adapter"  # the folder of the adapter beside the merged model


@dataclasses.dataclass(frozen=True)
class Method:
    """How to fine-tune; configs/finetune.py says what the fields mean."""

    method: str = "full"
    trainable: str = ""
    freeze: str = ""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str = "decoder"
    use_rslora: bool = False
    use_dora: bool = False
    quantization: str = "auto"

    def __post_init__(self):
        if self.method not in LEARNING_RATES:
            raise ConfigError(f"method={self.method!r} is not possible: give {', '.join(LEARNING_RATES)}")
        if self.quantization not in ("auto", *ops.FORMATS):
            raise ConfigError(f"quantization={self.quantization!r} is not possible: give auto, int4 or int8")
        if self.quantization != "auto" and self.method != "qlora":
            raise ConfigError(f"quantization={self.quantization} is for method=qlora: leave it out, or change method")
        _ = self.lora

    @property
    def has_adapters(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def lora(self) -> LoraSettings:
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_targets, self.use_rslora, self.use_dora)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What trains (float32), what stays as it is, how both make the parameters of the network, and words about it."""

    trained: Tree
    frozen: Tree
    join: Callable[[Tree, Tree], Tree]
    summary: str


def load_base(method: Method, checkpoint: str | Path, dtype: str, mesh: jax.sharding.Mesh | None = None) -> PaliGemma:
    """The model to start from, its weights plain, or quantized one by one; float32 where they are to train.

    With a mesh they are divided over its devices.

    Raises:
      ConfigError, CheckpointError: see `loading.load`, or the weights are not those that the method is for.
    """
    dtype_named(dtype)
    source = checkpoints.locate(checkpoint)
    stored = checkpoints.scan(source).quantization
    if method.has_adapters and source.adapter is not None:
        raise ConfigError(
            f"{checkpoint} is an adapter, and method={method.method} trains one over a whole model: merge it first, "
            f"paligemma-jax-convert {checkpoint} OUT"
        )
    if method.method != "qlora":
        if stored is not None:
            raise ConfigError(
                f"{checkpoint} is quantized and cannot be trained: give the original weights, or method=qlora"
            )
        return load(checkpoint, dtype if method.has_adapters else "float32", prepare=False, mesh=mesh)
    wanted = None if method.quantization == "auto" and stored else method.quantization.replace("auto", "int4")
    model = load(checkpoint, dtype, quantization=wanted if wanted != stored else None, prepare=False, mesh=mesh)
    model.params = ops.unprepare(model.params)  # q, k and v, gate and up have adapters of their own
    return model


def make_plan(method: Method, model: PaliGemma, dtype: str, seed: int) -> Plan:
    """Divide the parameters of a model from `load_base`, and draw adapters.

    Raises:
      ConfigError: a pattern matches nothing, or nothing trains.
    """
    names = names_of(model.config)
    frozen = matching_any(method.freeze, names)
    named = matching_any(method.trainable, names)
    whole = {path for path in names if path.startswith("language_model/")} if method.method == "decoder" else set(names)
    whole = named if method.has_adapters else whole & named if named else whole
    whole -= frozen
    trained, rest = split(model.params, whole)
    rest = jax.tree.map(lambda leaf: leaf if ops.is_weight(leaf) else leaf.astype(dtype), rest, is_leaf=ops.is_weight)
    words = f"of {parameter_count(model.config):,} parameters"
    if method.has_adapters:
        modules = {path.rpartition("/")[0] for path in whole}
        paths = [path for path in adapters.target_paths(method.lora, names, frozen) if path not in whole]
        if torn := [path for path in paths if path.rpartition("/")[0] in modules]:
            raise ConfigError(f"{torn[0]} has an adapter, so that its bias cannot train: change trainable or freeze")
        drawn = adapters.init_adapters(model.params, paths, method.lora, seed)
        trained = unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(drawn, sep="/"), sep="/")
        words = f"beside {words[3:]}; adapters of rank {method.lora_rank} over {adapters.describe(paths)}"
    if not jax.tree.leaves(trained):
        raise ConfigError("nothing trains: trainable and freeze leave nothing over")
    if method.method == "qlora":
        bits = min(leaf.quantization for leaf in jax.tree.leaves(rest, is_leaf=ops.is_weight) if ops.is_weight(leaf))
        words += f"; over {bits} weights, and what is written is the adapter merged into those of the checkpoint"
    summary = f"{method.method}: {sum(leaf.size for leaf in jax.tree.leaves(trained)):,} numbers train, {words}"
    scale = method.lora.scale if method.has_adapters else 1.0
    return Plan(trained, rest, functools.partial(join, dtype=dtype, scale=scale), summary)


def export(
    method: Method, model: PaliGemma, plan: Plan, trained: Tree, checkpoint: str | Path, dtype: str, output: Path
) -> None:
    """Write the tuned model as a Hugging Face directory, and its adapter beside it in PEFT's format.

    The model with adapters is `checkpoint` as it is on disk with the adapter merged: also where training went over
    quantized weights, of which the originals are there.
    """
    written = copy.copy(model)
    if method.has_adapters:
        written.params = adapters.merge(checkpoint, trained, method.lora, dtype)
        adapters.save(output / ADAPTER, model.config, trained, written.params, method.lora, _base(checkpoint))
    else:
        written.params = plan.join(trained, plan.frozen)
    written.save(output)


def _base(checkpoint: str | Path) -> str:
    """What an adapter calls its base: an absolute path, or a hub id."""
    resolved = checkpoints.resolve(checkpoint)
    is_hub_id = not expanded(checkpoint).exists() and "/" in str(checkpoint)
    return str(checkpoint) if is_hub_id else str(resolved.absolute())
