"""The stages that build the shipped patch ViT: pictures, a small CLIP, and the student that is distilled from it.

Each leaves its result in the work directory; running the same command again goes on where it was stopped.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax import patch_vit
from paligemma_jax.patch_vit.distill import Settings, distill
from paligemma_jax.patch_vit.plateau import Recipe as Optimizer
from paligemma_jax.shapes_world.pool import scene_pool
from paligemma_jax.shapes_world.teacher_stage import PROJECTION, train_teacher

_VALIDATION_SEED = 1_000_000  # of the pictures to validate on, plus the recipe's
_STORED = "float16"
_TRIES = 16  # windows of a scene that may become close-ups


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How each stage is trained; configs/make_patch_vit.py says what the numbers mean and has those of the shipped."""

    seed: int
    num_scenes: int
    num_validation: int
    teacher_scenes: int
    teacher_steps: int
    teacher_learning_rate: float
    teacher_batch_size: int
    close_up_epochs: int
    epochs: int
    last_epochs: int
    batch_size: int
    learning_rate: float
    masked: bool
    same_norm: bool
    scale: float
    encoder_from: str


STUDENT = {"patch_size": 10, "num_layers": 3, "num_heads": 4, "mlp_dim": 400}
_SIDE = 120  # of the student's input; each side has 12 patches
_CLOSE_SIDE = 60  # of a close-up


def build(work_dir: str | Path, output_dir: str | Path, recipe: Recipe) -> None:
    """Run all stages and write `teacher` and `student` into the output directory."""
    work, output = Path(work_dir), Path(output_dir)
    work.mkdir(parents=True, exist_ok=True)
    pools = {
        "train": scene_pool(work, recipe.seed, recipe.num_scenes, _SIDE, STUDENT["patch_size"]),
        "val": scene_pool(work, recipe.seed + _VALIDATION_SEED, recipe.num_validation, _SIDE, STUDENT["patch_size"]),
    }
    close = {name: close_ups(pool, _CLOSE_SIDE, len(pool["pixels"]), recipe.seed) for name, pool in pools.items()}
    teacher = work / "teacher"
    if not (teacher / "config.json").exists():
        numbers = (recipe.teacher_steps, recipe.teacher_learning_rate, recipe.teacher_batch_size, recipe.seed)
        both = [{key: part[key][: recipe.teacher_scenes] for key in part} for part in (pools["train"], close["train"])]
        train_teacher(work, both, recipe.encoder_from, *numbers).save(teacher, _STORED)
    for kind, parts in (("scenes", pools), ("close_ups", close)):
        for name, pool in parts.items():
            write_pictures(work / kind / name, pool["pixels"])
    student = _distill(work, recipe)
    params = student.params | ({"scale": np.full(1, recipe.scale, np.float32)} if "scale" in student.params else {})
    patch_vit.Student(student.config, params).save(output / "student", _STORED)
    patch_vit.load_clip(teacher).save(output / "teacher", _STORED)
    print(f"the patch ViT and its teacher are in {output}", file=sys.stderr)


def _distill(work: Path, recipe: Recipe) -> patch_vit.Student:
    """The student, distilled from close-ups, which cost a quarter of a scene, then scenes, these at two rates."""
    folder = work / f"student_{recipe.masked:d}{recipe.same_norm:d}"

    def phase(name: str, pictures: str, side: int, epochs: int, learning_rate: float, start_from: str) -> Path:
        settings = Settings(
            teacher=str(work / "teacher"),
            train=str(work / pictures / "train"),
            val=str(work / pictures / "val"),
            extra="",
            output_dir=str(folder / name),
            cache=str(work / "teacher.sqlite"),
            start_from=start_from,
            epochs=epochs,
            batch_size=recipe.batch_size,
            dtype="float32",
            augment=False,  # a crop would cut off shapes that the teacher names, a change of colours rename them
            seed=recipe.seed,
            log_every=100,
            embed_dim=PROJECTION,
            masked=recipe.masked,
            same_norm=recipe.same_norm,
            image_size=side,
            **STUDENT,
        )
        return distill(settings, Optimizer(learning_rate=learning_rate))

    rate = recipe.learning_rate
    small = phase("close_ups", "close_ups", _CLOSE_SIDE, recipe.close_up_epochs, rate, "")
    enlarged(patch_vit.load(small), _SIDE).save(folder / "enlarged")
    large = phase("scenes", "scenes", _SIDE, recipe.epochs, rate / 2, str(folder / "enlarged"))
    return patch_vit.load(phase("last", "scenes", _SIDE, recipe.last_epochs, rate / 10, str(large)))


def enlarged(student: patch_vit.Student, side: int) -> patch_vit.Student:
    """The student for pictures of a multiple of its side: its positions, side by side."""
    config = student.config.replaced(image_size=side)
    times, grid = config.grid // student.config.grid, student.config.grid
    positions = np.asarray(student.params["position_embedding"]["weight"]).reshape(grid, grid, -1)
    tiled = np.tile(positions, (times, times, 1)).reshape(config.num_patches, -1)
    return patch_vit.Student(config, student.params | {"position_embedding": {"weight": tiled}})


def close_ups(pool: dict[str, np.ndarray], side: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """At most `count` windows of a pool's pictures that cut through no shape and hold one or more.

    Returns:
      What a pool has of them: `pixels` u8 [M, side, side, 3], `shape` and `color` i8 [M, K].
    """
    whole = pool["pixels"].shape[1]
    rng = np.random.default_rng((seed, side))
    low = rng.integers(0, whole - side + 1, (_TRIES, len(pool["pixels"]), 1, 2))  # y, x of each try
    boxes, there = pool["box"] * whole, pool["shape"] >= 0
    inside = ((boxes[..., :2] >= low) & (boxes[..., 2:] <= low + side)).all(axis=-1) & there
    outside = ((boxes[..., 2:] <= low) | (boxes[..., :2] >= low + side)).any(axis=-1) | ~there
    good = np.argwhere((inside | outside).all(axis=-1) & inside.any(axis=-1))
    tries, rows = rng.permutation(good)[:count].T
    corners = low[tries, rows, 0]
    pictures = zip(rows, corners, strict=True)
    return {
        "pixels": np.stack([pool["pixels"][row, y : y + side, x : x + side] for row, (y, x) in pictures]),
        "shape": np.where(inside[tries, rows], pool["shape"][rows], -1).astype(np.int8),
        "color": np.where(inside[tries, rows], pool["color"][rows], -1).astype(np.int8),
    }


def write_pictures(folder: Path, pixels: np.ndarray) -> None:
    """Pictures u8 [N, S, S, 3] as PNG files, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(
        range(len(pixels)), desc=f"writing {folder.name}", unit="picture", disable=not sys.stderr.isatty()
    ):
        path = folder / f"{index:06d}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            Image.fromarray(np.asarray(pixels[index])).save(part, "PNG", compress_level=1)
            part.rename(path)
