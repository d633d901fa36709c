"""The stages that build the shipped patch ViT: pictures, a small CLIP, and the student that is distilled from it.

Each leaves its result in the work directory; running the same command again goes on where it was stopped.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax import checkpoints, patch_vit
from paligemma_jax.patch_vit.distill import Settings, distill
from paligemma_jax.patch_vit.plateau import Recipe as Optimizer
from paligemma_jax.shapes_world.pool import scene_pool
from paligemma_jax.shapes_world.teacher_stage import PROJECTION, train_teacher

_VALIDATION_SEED = 1_000_000  # of the pictures to validate on, plus the recipe's
_STORED = "float16"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How each stage is trained; configs/make_patch_vit.py says what the numbers mean and has those of the shipped."""

    seed: int
    num_scenes: int
    num_validation: int
    teacher_steps: int
    teacher_learning_rate: float
    teacher_batch_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    masked: bool
    same_norm: bool
    encoder_from: str


STUDENT = {"image_size": 120, "patch_size": 10, "num_layers": 4, "num_heads": 4, "mlp_dim": 400}


def build(work_dir: str | Path, output_dir: str | Path, recipe: Recipe) -> None:
    """Run all stages and write `teacher` and `student` into the output directory."""
    work, output = Path(work_dir), Path(output_dir)
    work.mkdir(parents=True, exist_ok=True)
    vision = checkpoints.scan(checkpoints.locate(recipe.encoder_from)).config.vision
    sizes = (vision.image_size, vision.patch_size)
    pools = {
        "train": scene_pool(work, recipe.seed, recipe.num_scenes, *sizes),
        "val": scene_pool(work, recipe.seed + _VALIDATION_SEED, recipe.num_validation, *sizes),
    }
    teacher = work / "teacher"
    if not (teacher / "config.json").exists():
        numbers = (recipe.teacher_steps, recipe.teacher_learning_rate, recipe.teacher_batch_size, recipe.seed)
        train_teacher(work, pools["train"], recipe.encoder_from, *numbers).save(teacher, _STORED)
    for name, pool in pools.items():
        write_pictures(work / "pictures" / name, pool["pixels"])
    student = distill(
        Settings(
            teacher=str(teacher),
            train=str(work / "pictures" / "train"),
            val=str(work / "pictures" / "val"),
            extra="",
            output_dir=str(work / f"student_{recipe.masked:d}{recipe.same_norm:d}"),
            cache=str(work / "teacher.sqlite"),
            start_from="",
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            dtype="float32",
            augment=False,  # a crop would cut off shapes that the teacher names, a change of colours rename them
            seed=recipe.seed,
            log_every=50,
            embed_dim=PROJECTION,
            masked=recipe.masked,
            same_norm=recipe.same_norm,
            **STUDENT,
        ),
        Optimizer(learning_rate=recipe.learning_rate),
    )
    patch_vit.load(student).save(output / "student", _STORED)
    patch_vit.load_clip(teacher).save(output / "teacher", _STORED)
    print(f"the patch ViT and its teacher are in {output}", file=sys.stderr)


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
