"""Images with their ground truth, for evaluation."""

import dataclasses

import numpy as np
from PIL import Image

from paligemma_jax.shapes_world import scenes, wide_scenes
from paligemma_jax.tasks.detection import Box


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and its K objects.

    kinds: (colour, shape) of each.
    boxes: x0, y0, x1, y1 of each in pixels.
    masks: bool [K, H, W].
    """

    image: Image.Image
    kinds: list[tuple[str, str]]
    boxes: list[Box]
    masks: np.ndarray


def scene_sample(seed: int, index: int) -> Sample:
    """A scene of the program that draws the training images; a seed gives an endless list of them."""
    return _sample(scenes.scene_at(seed, index))


def wide_sample(seed: int, index: int) -> Sample:
    """The same of the wider world: up to five objects or none."""
    return _sample(wide_scenes.wide_scene_at(seed, index))


def _sample(scene: scenes.Scene) -> Sample:
    kinds, boxes = [shape.kind for shape in scene.shapes], [shape.box for shape in scene.shapes]
    return Sample(scenes.draw(scene), kinds, boxes, scenes.masks(scene))
