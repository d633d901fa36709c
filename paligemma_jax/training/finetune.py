"""Fine-tuning on JSON lines, by any method, with the recipe of big_vision's transfers."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from paligemma_jax import numerics
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training import methods
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.data import check_pictures, make_batches, read_jsonl
from paligemma_jax.training.loop import fit
from paligemma_jax.training.loss import suffix_loss
from paligemma_jax.training.memory import memory_table
from paligemma_jax.training.methods import Method, Plan
from paligemma_jax.training.optimizer import Recipe, make_optimizer
from paligemma_jax.training.step import Tree, init_state, make_step

REMAT = ("none", "layers")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained on what, and where it goes; configs/finetune.py says what the fields mean."""

    checkpoint: str
    dtype: str
    data: str
    image_root: str
    output_dir: str
    epochs: int
    batch_size: int
    accumulate: int
    remat: str
    text_length: int
    seed: int
    log_every: int
    save_every: int
    save_minutes: float
    check_pictures: bool

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "text_length", "log_every", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is not possible: give an integer of at least 1")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}: change one of them"
            )
        if self.remat not in REMAT:
            raise ConfigError(f"remat={self.remat!r} is not possible: give {' or '.join(REMAT)}")
        if not self.save_minutes > 0:
            raise ConfigError(f"save_minutes={self.save_minutes} is not possible: give a number above 0")


def finetune(
    settings: Settings, recipe: Recipe, claim: Callable[[], None] = lambda: None, method: Method | None = None
) -> Path:
    """Train, going on where an earlier run with the same output_dir stopped.

    Args:
      claim: called when data and model are read and nothing is wrong with them, before anything is written.
      method: what trains; by default everything.

    Returns:
      The directory of the tuned model, in Hugging Face layout.

    Raises:
      UserError: see the message.
    """
    method = method or Method()
    examples = read_jsonl(settings.data, settings.image_root)
    model = methods.load_base(method, settings.checkpoint, settings.dtype)
    sizes = {name: getattr(settings, name) for name in ("epochs", "text_length", "seed")}
    batches = make_batches(
        examples, model.processor, batch_size=settings.batch_size // settings.accumulate, **sizes
    )  # micro-batches
    if not (num_steps := len(batches) // settings.accumulate):
        raise DataError(
            f"{len(examples)} examples and epochs={settings.epochs} do not fill one batch of {settings.batch_size}: "
            "lower batch_size"
        )
    if settings.check_pictures:
        check_pictures(examples, model.processor.image_settings)
    print(f"{len(examples)} examples, {num_steps} steps of {settings.batch_size}", file=sys.stderr)

    plan = methods.make_plan(method, model, settings.dtype, settings.seed)
    print(plan.summary, file=sys.stderr)
    optimizer = make_optimizer(recipe, num_steps)
    network = PaliGemma(model.config, remat=settings.remat == "layers")
    loss = functools.partial(suffix_loss, network, recipe.label_smoothing, batches.num_answers)
    batch_at = functools.partial(stacked, batches, settings.accumulate)
    output = Path(settings.output_dir)
    claim()
    state = init_state(plan.trained, optimizer)
    step = make_step(loss, optimizer, plan.frozen, plan.join, settings.accumulate)
    print(memory_table(step.compile(state, batch_at(0)), state, plan.frozen), file=sys.stderr)

    state = fit(
        state,
        step,
        batch_at,
        num_steps,
        checkpoints=open_checkpoints(output / "checkpoints"),
        save_every=settings.save_every,
        save_minutes=settings.save_minutes,
        log_every=settings.log_every,
        name="finetune",
        explain=functools.partial(explain, model.config, plan, settings.accumulate),
    )
    methods.export(method, model, plan, state.params, settings.checkpoint, settings.dtype, output)
    return output


def stacked(batches: Callable[[int], Tree], accumulate: int, step: int) -> Tree:
    """The batch of a step; where it has several micro-batches, they are a first axis of its arrays."""
    if accumulate == 1:
        return batches(step)
    parts = [batches(step * accumulate + i) for i in range(accumulate)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def explain(config: PaliGemmaConfig, plan: Plan, accumulate: int, trained: Tree, batch: Tree) -> str:
    """Why the loss or the gradient of a batch is not finite, from its micro-batches."""
    params = plan.join(trained, plan.frozen)
    parts = [batch] if accumulate == 1 else [{name: x[i] for name, x in batch.items()} for i in range(accumulate)]
    reasons = [numerics.explain_batch(config, params, part) for part in parts]
    return next((reason for reason in reasons if not reason.startswith(numerics.ALL_FINITE)), reasons[0])
