"""Distillation: a student learns the direction of a teacher's image embeddings, from pictures alone.

The teacher sees each picture once, as it is and by its own preprocessing; the student sees it augmented.

Axes: B pictures, S side of the student's input in pixels, D the teacher's space.
"""

import concurrent.futures
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.checkpoints import resolve
from paligemma_jax.errors import ConfigError, DataError
from paligemma_jax.files import write_text
from paligemma_jax.patch_vit.augment import augment
from paligemma_jax.patch_vit.config import StudentConfig
from paligemma_jax.patch_vit.models import Student, check_pair, load, load_clip
from paligemma_jax.patch_vit.network import apply
from paligemma_jax.patch_vit.plateau import Recipe, after_validation, make_optimizer
from paligemma_jax.patch_vit.student import PatchViT
from paligemma_jax.patch_vit.teacher_cache import TeacherCache, find_pictures, fingerprint, is_validation
from paligemma_jax.processing.image import load_image
from paligemma_jax.training.checkpoints import open_checkpoints
from paligemma_jax.training.data import shuffled
from paligemma_jax.training.loop import fit
from paligemma_jax.training.step import TrainState, init_state, make_step

_LOSS_WEIGHT = 20.0
_MOST_VALIDATION = 10_000
_FIXED = ("scale", "ln_post")  # the loss does not depend on them
_SHOWN = 3  # corrupt pictures that are named on stderr; all are in the file


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is distilled from what, and where it goes; configs/patch_vit_distill.py says what the fields mean."""

    teacher: str
    train: str
    val: str
    extra: str
    output_dir: str
    cache: str
    start_from: str
    epochs: int
    batch_size: int
    dtype: str
    augment: bool
    seed: int
    log_every: int
    image_size: int
    patch_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    masked: bool
    same_norm: bool

    def __post_init__(self):
        for name in ("epochs", "batch_size", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is not possible: give an integer of at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r} is not possible: give float32 or bfloat16, of the activations")
        for name in ("teacher", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: name a directory with --config.{name}=DIR")

    @property
    def student(self) -> StudentConfig:
        """The geometry of a student that starts from random weights."""
        names = ("image_size", "patch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "masked", "same_norm")
        sizes = {name: getattr(self, name) for name in names}
        return StudentConfig(**sizes, has_scale=self.same_norm, teacher=Path(self.teacher).name)


def distill(settings: Settings, recipe: Recipe) -> Path:
    """Train, going on where an earlier run with the same output_dir stopped.

    Returns:
      The directory of the student, which is written after each epoch.

    Raises:
      UserError: see the message.
    """
    output = Path(settings.output_dir)
    teacher_path = resolve(settings.teacher)
    teacher = load_clip(teacher_path)
    student = start(settings)
    check_pair(student, teacher)
    given = {name: find_pictures(_folders(getattr(settings, name))) for name in ("train", "val", "extra")}
    cache = TeacherCache(Path(settings.cache or output / "teacher.sqlite"), fingerprint(teacher_path))
    known, corrupt = cache.fill([path for paths in given.values() for path in paths], teacher)
    _report(corrupt, output)
    train, val = split(given, known)
    print(f"{len(train)} pictures to train on, {len(val)} to validate", file=sys.stderr)
    if len(train) < settings.batch_size:
        raise DataError(f"{len(train)} pictures do not fill one batch of {settings.batch_size}: lower batch_size")
    if not val:
        raise DataError("there are no pictures to validate on: name a folder with val, or more pictures with extra")

    mesh = _Mesh(settings.batch_size)
    optimizer, step_fn, losses = _programs(student.config, settings.dtype, recipe)
    size, seed = student.config.image_size, settings.seed
    batch = functools.partial(_batch, cache, known, student)
    order = shuffled(train, settings.batch_size, settings.epochs, seed)
    steps_per_epoch = len(train) // settings.batch_size
    validate = _Validation(losses, settings.batch_size, val, batch, mesh)

    def batch_at(step: int) -> dict[str, jax.Array]:
        rng = functools.partial(_rng, seed, step)
        change = (lambda image, row: augment(image, size, rng(row))) if settings.augment else None
        return mesh.split(batch(order[step], change))

    def evaluate(state: TrainState) -> TrainState:
        value = validate(state.params)
        schedule = after_validation(recipe, state.opt_state, value)
        epoch, rate = int(state.step) // steps_per_epoch, float(schedule.learning_rate)
        print(
            f"epoch {epoch}/{settings.epochs}  validation loss {value:.4g}  learning rate {rate:.3g}", file=sys.stderr
        )
        Student(student.config, jax.device_get(state.params)).save(output)
        return dataclasses.replace(state, opt_state=schedule)

    fit(
        mesh.copy(init_state(student.params, optimizer)),
        step_fn,
        batch_at,
        steps_per_epoch * settings.epochs,
        checkpoints=open_checkpoints(output / "checkpoints"),
        save_every=steps_per_epoch,
        log_every=settings.log_every,
        name="distill",
        evaluate=evaluate,
    )
    return output


@functools.cache
def _programs(config: StudentConfig, dtype: str, recipe: Recipe) -> tuple[Any, Any, Any]:
    """The optimizer, the jitted step and the jitted `row_losses` of a student."""
    model, optimizer = PatchViT(config), make_optimizer(recipe, trained)
    loss = functools.partial(distill_loss, model, dtype)
    return optimizer, make_step(loss, optimizer), jax.jit(functools.partial(row_losses, model, dtype))


def start(settings: Settings) -> Student:
    """The student that training starts with: that of `start_from`, or one with random weights."""
    if settings.start_from:
        return load(settings.start_from)
    config = settings.student
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return Student(config, jax.jit(PatchViT(config).init)(jax.random.key(settings.seed), pixels)["params"])


def trained(params: Any) -> Any:
    """True for the parameters that the loss depends on."""
    return {name: jax.tree.map(lambda _, name=name: name not in _FIXED, part) for name, part in params.items()}


def row_losses(model: PatchViT, dtype: str, params: Any, pixels: jax.Array, targets: jax.Array) -> jax.Array:
    """20 times the mean distance of the coordinates of unit vectors, of each picture: f32 [B].

    Args:
      dtype: of weights and activations while they are computed with; sums, norms and the loss are float32.
      pixels: f32 [B, S, S, 3].
      targets: the teacher's embeddings f32 [B, D].
    """
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    pooled, _ = apply(model, params, pixels, method="embed")
    return _LOSS_WEIGHT * jnp.mean(jnp.abs(_unit(pooled) - _unit(targets)), axis=-1)


def distill_loss(model: PatchViT, dtype: str, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
    """The mean of `row_losses` of a batch."""
    return jnp.mean(row_losses(model, dtype, params, batch["pixels"], batch["targets"])), {}


def split(given: dict[str, list[str]], known: dict[str, bytes]) -> tuple[list[str], list[str]]:
    """Pictures to train on and to validate, those that could be read; one in ten of `extra` is to validate."""
    readable = {name: [path for path in paths if path in known] for name, paths in given.items()}
    train = readable["train"] + [path for path in readable["extra"] if not is_validation(known[path])]
    val = readable["val"] + [path for path in readable["extra"] if is_validation(known[path])]
    return train, sorted(val, key=lambda path: known[path])[:_MOST_VALIDATION]


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _folders(names: str) -> list[str]:
    return [name.strip() for name in names.split(";") if name.strip()]


def _rng(seed: int, step: int, row: int) -> np.random.Generator:
    return np.random.default_rng((seed, step, row))


def _batch(
    cache: TeacherCache,
    known: dict[str, bytes],
    student: Student,
    paths: Sequence[str],
    change: Callable[[Any, int], Any] | None,
) -> dict[str, np.ndarray]:
    def read(row: int) -> np.ndarray:
        image = load_image(paths[row])
        return student.settings.one(image if change is None else change(image, row))

    pixels = list(_readers().map(read, range(len(paths))))
    return {"pixels": np.stack(pixels), "targets": cache.vectors([known[path] for path in paths])}


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "pictures")


class _Mesh:
    """All devices; each gets its share of a batch, and all parameters."""

    def __init__(self, batch_size: int):
        count = jax.device_count()
        if batch_size % count:
            raise ConfigError(f"batch_size={batch_size} cannot be split among {count} devices: give a multiple")
        mesh = Mesh(np.array(jax.devices()), ("data",))
        self._rows, self._whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def split(self, batch: Any) -> Any:
        return jax.device_put(batch, self._rows)

    def copy(self, state: Any) -> Any:
        return jax.device_put(state, self._whole)


class _Validation:
    """Mean loss over the validation pictures, not augmented."""

    def __init__(self, losses: Callable, size: int, paths: list[str], batch: Callable, mesh: _Mesh):
        self._losses, self._size, self._paths, self._batch, self._mesh = losses, size, paths, batch, mesh

    def __call__(self, params: Any) -> float:
        total = 0.0
        for first in range(0, len(self._paths), self._size):
            paths = self._paths[first : first + self._size]
            batch = self._batch([*paths, *[paths[0]] * (self._size - len(paths))], None)  # as many rows in every batch
            losses = self._losses(params, **self._mesh.split(batch))
            total += float(np.asarray(losses, np.float64)[: len(paths)].sum())
        return total / len(self._paths)


def _report(corrupt: dict[str, str], output: Path) -> None:
    """Say which pictures are left out; all of them with their reasons are in corrupt.txt."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "corrupt.txt"
    write_text(file, "".join(f"{reason}\n" for reason in corrupt.values()))
    if corrupt:
        for reason in list(corrupt.values())[:_SHOWN]:
            print(f"left out: {reason}", file=sys.stderr)
        print(f"{len(corrupt)} pictures cannot be read and are left out, {file} names them", file=sys.stderr)
