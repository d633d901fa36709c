"""Fine-tuning on examples, by any method, with the recipe of big_vision's transfers."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from paligemma_jax import numerics
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.sharding import Layout, make_mesh
from paligemma_jax.training import methods
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.data import Batches, Example, check_pictures, make_batches, open_data
from paligemma_jax.training.data.augment import Augmentation, read_kinds
from paligemma_jax.training.data.masks import MaskCodec
from paligemma_jax.training.logs import make_loggers
from paligemma_jax.training.loop import fit
from paligemma_jax.training.loss import dropout_keys, suffix_loss
from paligemma_jax.training.memory import memory_table
from paligemma_jax.training.methods import Method, Plan
from paligemma_jax.training.optimizer import Recipe, averaged, make_optimizer, make_schedule
from paligemma_jax.training.parallel import host_rows, is_first, shard_batch, shard_state, step_shardings, to_host
from paligemma_jax.training.step import Tree, init_state, make_step
from paligemma_jax.training.trainable import names_of
from paligemma_jax.training.watch import Watch, make_validation, recover

REMAT = ("none", "layers")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained on what, and where it goes; configs/finetune.py says what the fields mean."""

    checkpoint: str
    dtype: str
    data: str
    image_root: str
    data_format: str
    data_task: str
    augment: str
    data_threads: int
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
    mesh: str

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "text_length", "data_threads", "log_every", "save_every"):
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
    settings: Settings,
    recipe: Recipe,
    claim: Callable[[], None] = lambda: None,
    method: Method | None = None,
    watch: Watch | None = None,
) -> Path:
    """Train, going on where an earlier run with the same output_dir stopped.

    Args:
      claim: called when data and model are read and nothing is wrong with them, before anything is written.
      method: what trains; by default everything.
      watch: what is measured and told meanwhile; by default the training loss alone.

    Returns:
      The directory of the tuned model, in Hugging Face layout.

    Raises:
      UserError: see the message.
    """
    method, watch = method or Method(), watch or Watch()
    if watch.val_data and jax.process_count() > 1:
        raise ConfigError("val_data is for a single process: leave it out, and evaluate what was saved")
    if not settings.mesh and jax.process_count() > 1:
        raise ConfigError(f"{jax.process_count()} processes need a mesh over their devices: give mesh=auto")
    kinds, codec = read_kinds(settings.augment), MaskCodec(lambda: model.mask_decoder())
    examples, held_out = (
        _open(settings, *place, codec) for place in ((settings.data, "train"), (watch.val_data, "valid"))
    )
    mesh = make_mesh(settings.mesh) if settings.mesh else None
    model = methods.load_base(method, settings.checkpoint, settings.dtype, mesh)
    if settings.data_task == "segment":
        model.mask_decoder()  # a file that is missing is known before anything is trained
    layout, micro_size = model.runner.layout, settings.batch_size // settings.accumulate
    host_index, host_count = host_rows(layout, micro_size)
    batches = make_batches(
        examples,
        model.processor,
        batch_size=micro_size,
        epochs=settings.epochs,
        text_length=settings.text_length,
        seed=settings.seed,
        augmentation=Augmentation(kinds, settings.seed, codec) if kinds else None,
        num_threads=settings.data_threads,
        host_index=host_index,
        host_count=host_count,
    )
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
    optimizer = make_optimizer(recipe, num_steps, names_of(model.config))
    network = PaliGemma(model.config, remat=settings.remat == "layers")
    loss = functools.partial(suffix_loss, network, recipe.label_smoothing, batches.num_answers, dropout=recipe.dropout)
    batch_at = functools.partial(global_batch, batches, layout, settings, recipe.dropout > 0)
    output = Path(settings.output_dir)

    def save(trained: Tree, directory: Path) -> None:
        ours, whole = to_host(trained), plan  # beside adapters the weights come from the checkpoint again
        if not method.has_adapters:
            whole = dataclasses.replace(plan, frozen=to_host(plan.frozen))
        if is_first():
            methods.export(method, model, whole, ours, settings.checkpoint, settings.dtype, directory)

    validation = make_validation(
        watch,
        model,
        held_out,
        settings.batch_size,
        max(num_steps // settings.epochs, 1),
        output,
        lambda trained: plan.join(trained, plan.frozen),
        save,
    )
    loggers = make_loggers(output, watch.log) if is_first() else ()
    schedule = make_schedule(recipe, num_steps)
    state = shard_state(layout, functools.partial(init_state, optimizer=optimizer), plan.trained)
    claim()
    if is_first():
        recover(output)
    step = make_step(loss, optimizer, plan.frozen, plan.join, settings.accumulate, step_shardings(layout, state))
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
        loggers=loggers,
        validation=validation,
        num_examples=settings.batch_size,
        learning_rate=lambda step: recipe.learning_rate * schedule(step),
    )
    save(averaged(state), output)
    return output


def _open(settings: Settings, data: str, split: str, codec: MaskCodec) -> Sequence[Example]:
    """The examples of a split; none where no data are named."""
    if not data:
        return []
    return open_data(
        data,
        settings.image_root,
        split=split,
        data_format=settings.data_format,
        task=settings.data_task,
        encode=codec.encode,
        tell=functools.partial(print, file=sys.stderr),
    )


def global_batch(batches: Batches, layout: Layout | None, settings: Settings, drops: bool, step: int) -> Tree:
    """The batch of a step, divided over the devices, with what says which values are dropped, if any are."""
    accumulate, index, count = settings.accumulate, batches.host_index, batches.host_count
    batch = stacked(batches, accumulate, step)
    if drops:  # the same however the rows are divided
        rows = dropout_keys(settings.seed, step, settings.batch_size).reshape(accumulate, count, -1, 2)[:, index]
        batch["dropout_keys"] = rows if accumulate > 1 else rows[0]
    return shard_batch(layout, batch, index, count, micro=accumulate > 1)


def stacked(batches: Callable[[int], Tree], accumulate: int, step: int) -> Tree:
    """The batch of a step; where it has several micro-batches, they are a first axis of its arrays."""
    if accumulate == 1:
        return batches(step)
    parts = [batches(step * accumulate + i) for i in range(accumulate)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def explain(config: PaliGemmaConfig, plan: Plan, accumulate: int, trained: Tree, batch: Tree) -> str:
    """Why the loss or the gradient of a batch is not finite, from its micro-batches; "" where others hold a part."""
    if jax.process_count() > 1:
        return ""
    params = plan.join(trained, plan.frozen)
    parts = [batch] if accumulate == 1 else [{name: x[i] for name, x in batch.items()} for i in range(accumulate)]
    reasons = [numerics.explain_batch(config, params, part) for part in parts]
    return next((reason for reason in reasons if not reason.startswith(numerics.ALL_FINITE)), reasons[0])
