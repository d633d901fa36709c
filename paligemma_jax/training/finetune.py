"""Fine-tuning of a whole model on examples, with the recipe of big_vision's transfers."""

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
from paligemma_jax.training.data import check_pictures, make_batches, open_data
from paligemma_jax.training.data.augment import Augmentation, read_kinds
from paligemma_jax.training.data.masks import MaskCodec
from paligemma_jax.training.loop import fit
from paligemma_jax.training.loss import suffix_loss
from paligemma_jax.training.optimizer import Recipe, make_optimizer
from paligemma_jax.training.step import init_state, make_step


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
    text_length: int
    seed: int
    log_every: int
    save_every: int
    save_minutes: float
    check_pictures: bool

    def __post_init__(self):
        for name in ("epochs", "batch_size", "text_length", "data_threads", "log_every", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is not possible: give an integer of at least 1")
        if not self.save_minutes > 0:
            raise ConfigError(f"save_minutes={self.save_minutes} is not possible: give a number above 0")


def finetune(settings: Settings, recipe: Recipe, claim: Callable[[], None] = lambda: None) -> Path:
    """Train, going on where an earlier run with the same output_dir stopped.

    Args:
      claim: called when data and model are read and nothing is wrong with them, before anything is written.

    Returns:
      The directory of the tuned model, in Hugging Face layout.

    Raises:
      UserError: see the message.
    """
    kinds = read_kinds(settings.augment)
    codec = MaskCodec(lambda: model.mask_decoder())
    examples = open_data(
        settings.data,
        settings.image_root,
        data_format=settings.data_format,
        task=settings.data_task,
        encode=codec.encode,
        tell=functools.partial(print, file=sys.stderr),
    )
    model = load(settings.checkpoint, settings.dtype, prepare=False)
    if settings.data_task == "segment":
        model.mask_decoder()  # a file that is missing is known before anything is trained
    if any(map(ops.is_weight, flatten_dict(model.params).values())):
        raise ConfigError(f"{settings.checkpoint} is quantized and cannot be trained: give the original weights")
    sizes = {name: getattr(settings, name) for name in ("batch_size", "epochs", "text_length", "seed")}
    augmentation = Augmentation(kinds, settings.seed, codec) if kinds else None
    batches = make_batches(
        examples, model.processor, **sizes, augmentation=augmentation, num_threads=settings.data_threads
    )
    if settings.check_pictures:
        check_pictures(examples, model.processor.image_settings)
    print(f"{len(examples)} examples, {len(batches)} steps of {settings.batch_size}", file=sys.stderr)

    optimizer = make_optimizer(recipe, len(batches))
    loss = functools.partial(suffix_loss, PaliGemma(model.config), recipe.label_smoothing, batches.num_answers)
    output = Path(settings.output_dir)
    claim()
    state = fit(
        init_state(model.params, optimizer),
        make_step(loss, optimizer),
        batches,
        len(batches),
        checkpoints=open_checkpoints(output / "checkpoints"),
        save_every=settings.save_every,
        save_minutes=settings.save_minutes,
        log_every=settings.log_every,
        name="finetune",
        explain=functools.partial(numerics.explain_batch, model.config),
    )
    model.params = state.params
    model.save(output)
    return output
