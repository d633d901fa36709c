"""Fine-tuning of a whole model on JSON lines, with the recipe of big_vision's transfers."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from flax.traverse_util import flatten_dict

from paligemma_jax import numerics, ops
from paligemma_jax.errors import ConfigError
from paligemma_jax.loading import load
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.data import check_pictures, make_batches, read_jsonl
from paligemma_jax.training.logs import make_loggers
from paligemma_jax.training.loop import fit
from paligemma_jax.training.loss import dropout_keys, suffix_loss
from paligemma_jax.training.optimizer import Recipe, averaged, make_optimizer, make_schedule
from paligemma_jax.training.step import Tree, init_state, make_step
from paligemma_jax.training.watch import Watch, make_validation, recover


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
    text_length: int
    seed: int
    log_every: int
    save_every: int
    save_minutes: float
    check_pictures: bool

    def __post_init__(self):
        for name in ("epochs", "batch_size", "text_length", "log_every", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is not possible: give an integer of at least 1")
        if not self.save_minutes > 0:
            raise ConfigError(f"save_minutes={self.save_minutes} is not possible: give a number above 0")


def finetune(
    settings: Settings, recipe: Recipe, watch: Watch | None = None, claim: Callable[[], None] = lambda: None
) -> Path:
    """Train, going on where an earlier run with the same output_dir stopped.

    Args:
      watch: what is measured and told meanwhile; by default the training loss alone.
      claim: called when data and model are read and nothing is wrong with them, before anything is written.

    Returns:
      The directory of the tuned model, in Hugging Face layout.

    Raises:
      UserError: see the message.
    """
    examples = read_jsonl(settings.data, settings.image_root)
    model = load(settings.checkpoint, settings.dtype, prepare=False)
    if any(map(ops.is_weight, flatten_dict(model.params).values())):
        raise ConfigError(f"{settings.checkpoint} is quantized and cannot be trained: give the original weights")
    sizes = {name: getattr(settings, name) for name in ("batch_size", "epochs", "text_length", "seed")}
    batches = make_batches(examples, model.processor, **sizes)
    if settings.check_pictures:
        check_pictures(examples, model.processor.image_settings)
    print(f"{len(examples)} examples, {len(batches)} steps of {settings.batch_size}", file=sys.stderr)

    optimizer = make_optimizer(recipe, len(batches))
    loss = functools.partial(
        suffix_loss, PaliGemma(model.config), recipe.label_smoothing, batches.num_answers, dropout=recipe.dropout
    )
    output = Path(settings.output_dir)

    def save(params: Tree, directory: Path) -> None:
        model.params = params
        model.save(directory)

    watch = watch or Watch()
    validation = make_validation(
        watch,
        model,
        settings.image_root,
        settings.batch_size,
        len(batches) // settings.epochs,
        output,
        lambda params: params,
        save,
    )
    loggers = make_loggers(output, watch.log)
    schedule = make_schedule(recipe, len(batches))
    state = init_state(model.params, optimizer)
    claim()
    recover(output)
    state = fit(
        state,
        make_step(loss, optimizer),
        _with_dropout_keys(batches, settings) if recipe.dropout else batches,
        len(batches),
        checkpoints=open_checkpoints(output / "checkpoints"),
        save_every=settings.save_every,
        save_minutes=settings.save_minutes,
        log_every=settings.log_every,
        name="finetune",
        explain=functools.partial(numerics.explain_batch, model.config),
        loggers=loggers,
        validation=validation,
        num_examples=settings.batch_size,
        learning_rate=lambda step: recipe.learning_rate * schedule(step),
    )
    save(averaged(state), output)
    return output


def _with_dropout_keys(batches: Callable[[int], Tree], settings: Settings) -> Callable[[int], Tree]:
    """Batches that say which values are dropped, as a function of the step too."""

    def batch_at(step: int) -> Tree:
        return {**batches(step), "dropout_keys": dropout_keys(settings.seed, step, settings.batch_size)}

    return batch_at
