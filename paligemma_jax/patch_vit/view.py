"""What a page shows of a picture and some phrases."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from paligemma_jax.patch_vit.activation import phrase_maps
from paligemma_jax.patch_vit.drawing import overlay
from paligemma_jax.patch_vit.models import Clip, Student
from paligemma_jax.patch_vit.windows import AUTO
from paligemma_jax.processing.decode import to_rgb


def heatmap_view(
    student: Student, clip: Clip, image: Image.Image, phrases: Sequence[str], windows: str | int = AUTO
) -> tuple[list[Image.Image], np.ndarray]:
    """An overlay of the picture's size for each phrase, and the maps f32 [T, R, C].

    Errors are those of `phrase_maps`.
    """
    image = to_rgb(image, "the picture")
    (found,) = phrase_maps(student, clip, [image], phrases, windows)
    return [overlay(image, values) for values in found.maps], found.maps
