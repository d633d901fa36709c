"""Scenes of the wider world: up to five shapes at any rotation, on textures, leaves, clouds and blur, photographed.

A model sees every image stretched to a square, where a square that stands on its corner looks like a rhombus. Images
are therefore at most 4:3, and a diamond's diagonals differ by `_DIAGONALS` times that: so stretched, those of a diamond
differ by 1.5 and more, those of a turned square by 1.33 at most.
"""

import math

import numpy as np

from paligemma_jax.shapes_world.backdrops import backdrop
from paligemma_jax.shapes_world.scenes import (
    MAX_OBJECTS,
    SHAPES,
    Proportions,
    Scene,
    Shape,
    are_apart,
    outline_mask,
    polygon,
    rotated,
    sample_color,
    sample_kinds,
    sample_size,
    scattered,
)

_ASPECT = 4 / 3  # of the longest image
_DIAGONALS = 1.5, 2.4  # the longer diagonal over the shorter: least in a square image, and most
_EMPTY = 0.1  # share of scenes without a shape
_CONTRAST = 70.0  # least distance in RGB between a shape and nearly all of what is around it
_FAINT = 0.03  # share of the surroundings that may be nearer
_TRIES = 20  # places and colours for a shape

# For the mask VQ-VAE, which should know more than the scenes show.
_ALL_PROPORTIONS = Proportions(triangle=(1.5, 2.4), diamond=(0.38, 0.75), star=(0.33, 0.53))
_MASK_WEIGHTS = (0.04, 0.2, 0.26, 0.28, 0.22)  # in the order of SHAPES; all circles are one mask


def sample_wide_scene(
    rng: np.random.Generator, *, num_objects: int | None = None, max_side: int = 640, min_side: int = 96
) -> Scene:
    """A random wide scene: `num_objects` shapes (none to five if None) that do not touch, wholly inside the image."""
    size = sample_size(rng, _ASPECT, min_side, max_side)
    count = num_objects
    if count is None:
        count = 0 if rng.random() < _EMPTY else int(rng.integers(1, MAX_OBJECTS + 1))
    kinds = sample_kinds(count, rng)
    while True:  # another background when the shapes find no room or do not stand out
        background = backdrop(size, rng)
        shapes = _place_shapes(kinds, size, background, rng)
        if shapes is not None:
            break
    noise, light = rng.uniform(1, 10), rng.uniform(0, 0.06)
    return Scene(size, shapes, background, 0.0, int(rng.integers(2**32)), noise, light)


def wide_scene_at(seed: int, index: int, **kwargs) -> Scene:
    """The wide scene of an index in the endless list that a seed stands for."""
    return sample_wide_scene(np.random.default_rng((seed, index)), **kwargs)


def _place_shapes(
    kinds: list[tuple[str, str]], size: tuple[int, int], background: np.ndarray, rng: np.random.Generator
) -> tuple[Shape, ...] | None:
    side, aspect = min(size), max(size) / min(size)
    gap = side * rng.uniform(0.0, 0.03) + 1.0
    least, most = _DIAGONALS
    proportions = Proportions(triangle=(math.sqrt(3), 2.0), diamond=(1 / most, 1 / (least * aspect)), star=(0.36, 0.5))
    placed: list[Shape] = []
    for color, shape in kinds:
        for _ in range(_TRIES):
            corners = rotated(polygon(shape, rng, proportions), rng.uniform(0, 360))
            candidate = Shape(shape, color, sample_color(color, rng), scattered(corners, size, rng))
            free = all(are_apart(candidate.box, other.box, gap) for other in placed)
            if free and contrast(candidate, size, background) >= _CONTRAST:
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def contrast(shape: Shape, size: tuple[int, int], background: np.ndarray) -> float:
    """Distance in RGB between a shape's colour and what is in and around its box, but for the nearest few percent."""
    height, width = background.shape[:2]
    x0, y0, x1, y1 = shape.box
    margin = 0.02 * min(size) + 1
    left, right = ((x + d) * width / size[0] for x, d in ((x0, -margin), (x1, margin)))
    top, bottom = ((y + d) * height / size[1] for y, d in ((y0, -margin), (y1, margin)))
    part = background[max(0, int(top)) : math.ceil(bottom), max(0, int(left)) : math.ceil(right)]
    part = part[:: len(part) // 32 + 1, :: part.shape[1] // 32 + 1].astype(np.float32)
    distance = np.sqrt(((part - shape.rgb) ** 2).sum(axis=-1)).ravel()
    return float(np.partition(distance, int(_FAINT * len(distance)))[int(_FAINT * len(distance))])


def rotated_masks(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Masks bool [count, side, side] of shapes in their boxes: all rotations, and more proportions than are drawn."""
    out = np.zeros((count, side, side), bool)
    for i, shape in enumerate(rng.choice(SHAPES, count, p=_MASK_WEIGHTS)):
        corners = rotated(polygon(str(shape), rng, _ALL_PROPORTIONS), rng.uniform(0, 360))
        corners[:, 0] *= _ASPECT ** rng.uniform(-1, 1)
        out[i] = outline_mask(corners, side) >= 0.5
    return out
