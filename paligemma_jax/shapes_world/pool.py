"""The training set: many scenes drawn once, as memory-mapped arrays that training reads again and again.

Axes: N scenes, B of them in a batch, K = 5 object slots, S side of the model's image in pixels, P patches of it.
"""

import concurrent.futures
import multiprocessing
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax.errors import DataError
from paligemma_jax.shapes_world.scenes import COLORS, MAX_OBJECTS, SHAPES, Scene, coverage, draw, scene_at, unit_mask
from paligemma_jax.shapes_world.wide_scenes import wide_scene_at

_CHUNK = 500
MASK_SIDE = 64


def scene_record(scene: Scene, image_size: int, patch_size: int) -> dict[str, np.ndarray]:
    """One scene as the model sees it.

    `pixels` u8 [S, S, 3]; `shape`, `color` i8 [K] (-1 where there is none); `box` f32 [K, 4] as y0, x0, y1, x1 in
    0..1; `coverage` u8 [K, P], the share of each patch that a shape covers; `mask` u8 [K, 64 * 64 / 8], packed bits of
    the shape in its own box.
    """
    grid = image_size // patch_size
    image = draw(scene).resize((image_size, image_size), Image.Resampling.BICUBIC)
    record = {
        "pixels": np.asarray(image),
        "shape": np.full(MAX_OBJECTS, -1, np.int8),
        "color": np.full(MAX_OBJECTS, -1, np.int8),
        "box": np.zeros((MAX_OBJECTS, 4), np.float32),
        "coverage": np.zeros((MAX_OBJECTS, grid * grid), np.uint8),
        "mask": np.zeros((MAX_OBJECTS, MASK_SIDE * MASK_SIDE // 8), np.uint8),
    }
    size = np.array(scene.size)
    for i, shape in enumerate(scene.shapes):
        record["shape"][i] = SHAPES.index(shape.shape)
        record["color"][i] = COLORS.index(shape.color)
        x0, y0, x1, y1 = shape.box
        record["box"][i] = y0 / size[1], x0 / size[0], y1 / size[1], x1 / size[0]
        record["coverage"][i] = np.asarray(coverage(shape.outline / size * grid, (grid, grid), 8)).ravel()
        record["mask"][i] = np.packbits(unit_mask(shape) >= 0.5)
    return record


def mixed_scene_at(seed: int, index: int, wide_share: float) -> Scene:
    """A scene of a list in which a share of the scenes, evenly spread, is of the wider world."""
    wide = int((index + 1) * wide_share) > int(index * wide_share)
    return (wide_scene_at if wide else scene_at)(seed, index)


def _draw_chunk(job: tuple[int, int, int, int, int, float]) -> dict[str, np.ndarray]:
    seed, start, count, image_size, patch_size, wide_share = job
    records = [scene_record(mixed_scene_at(seed, start + i, wide_share), image_size, patch_size) for i in range(count)]
    return {key: np.stack([r[key] for r in records]) for key in records[0]}


def scene_pool(
    directory: str | Path, seed: int, num_scenes: int, image_size: int, patch_size: int, wide_share: float = 0.0
) -> dict[str, np.ndarray]:
    """`num_scenes` records, stacked and memory-mapped; drawn by all cores the first time, read from disk after.

    A share of the scenes is of the wider world, the others are calm.
    """
    name = f"scenes_{seed}_{num_scenes}_{image_size}_{patch_size}_{MAX_OBJECTS}_{wide_share:g}"
    directory = Path(directory) / name
    if not directory.exists():
        _draw_pool(directory, seed, num_scenes, image_size, patch_size, wide_share)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(directory.glob("*.npy"))}


def _draw_pool(
    directory: Path, seed: int, num_scenes: int, image_size: int, patch_size: int, wide_share: float
) -> None:
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_scenes, _CHUNK)
    jobs = [(seed, start, min(_CHUNK, num_scenes - start), image_size, patch_size, wide_share) for start in starts]
    arrays: dict[str, np.memmap] = {}
    workers = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    with workers, tqdm(total=num_scenes, desc="drawing scenes", unit="scene") as bar:
        for job, chunk in zip(jobs, workers.map(_draw_chunk, jobs), strict=True):
            for key, values in chunk.items():
                if key not in arrays:
                    shape = (num_scenes, *values.shape[1:])
                    arrays[key] = np.lib.format.open_memmap(partial / f"{key}.npy", "w+", values.dtype, shape)
                arrays[key][job[1] : job[1] + len(values)] = values
            bar.update(job[2])
    for array in arrays.values():
        array.flush()
    partial.rename(directory)


def epoch_rows(num_rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Sorted row numbers of one batch: every epoch is a fresh permutation, as a function of the step alone."""
    per_epoch = num_rows // batch_size
    if not per_epoch:
        raise DataError(f"{num_rows} pictures do not fill a batch of {batch_size}: raise num_scenes")
    order = np.random.default_rng((seed, step // per_epoch)).permutation(num_rows)
    start = step % per_epoch * batch_size
    return np.sort(order[start : start + batch_size])


def take(pool: dict[str, np.ndarray], rows: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
    """The records of some rows of a pool [B, ...] without the masks, flipped where `mirrored` [B] says so."""
    return mirror({key: pool[key][rows] for key in ("pixels", "shape", "color", "box", "coverage")}, mirrored)


def mirror(record: dict[str, np.ndarray], mirrored: np.ndarray) -> dict[str, np.ndarray]:
    """Flip the chosen images [B] horizontally, with boxes and coverage."""
    record = dict(record)
    record["pixels"] = np.where(mirrored[:, None, None, None], record["pixels"][:, :, ::-1], record["pixels"])
    y0, x0, y1, x1 = np.moveaxis(record["box"], -1, 0)
    record["box"] = np.where(mirrored[:, None, None], np.stack([y0, 1 - x1, y1, 1 - x0], -1), record["box"])
    batch, slots, patches = record["coverage"].shape
    grid = record["coverage"].reshape(batch, slots, round(patches**0.5), -1)
    grid = np.where(mirrored[:, None, None, None], grid[..., ::-1], grid)
    record["coverage"] = grid.reshape(batch, slots, patches)
    return record


def turn(record: dict[str, np.ndarray], turns: np.ndarray) -> dict[str, np.ndarray]:
    """Turn each image by some quarters [B], counter-clockwise, with boxes and coverage."""
    record = {key: np.array(value) for key, value in record.items()}
    batch, slots, patches = record["coverage"].shape
    grid = record["coverage"].reshape(batch, slots, round(patches**0.5), -1)  # a view
    for quarters in (1, 2, 3):
        chosen = turns == quarters
        record["pixels"][chosen] = np.rot90(record["pixels"][chosen], quarters, (1, 2))
        grid[chosen] = np.rot90(grid[chosen], quarters, (2, 3))
        for _ in range(quarters):
            y0, x0, y1, x1 = np.moveaxis(record["box"][chosen], -1, 0)
            record["box"][chosen] = np.stack([1 - x1, y0, 1 - x0, y1], axis=-1)
    record["box"][record["shape"] < 0] = 0  # of slots without an object
    return record


def views(masks: np.ndarray) -> np.ndarray:
    """Masks [M, S, S] as `mirror` and `turn` leave them: [8, M, S, S], in the order of `view_index`."""
    return np.stack([np.rot90(view, k, (1, 2)) for k in range(4) for view in (masks, masks[..., ::-1])])


def view_index(mirrored: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Which of the `views` shows what is mirrored [B], if at all, and then turned by some quarters [B]."""
    return mirrored.astype(int) + 2 * turns
