"""Where a parameter goes once it is read."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from paligemma_jax.checkpoints.arrays import empty_aligned
from paligemma_jax.models.padded import Padded

Place = Callable[[str, Any], Any]  # (path, array) -> what the parameter tree holds


def on_device(path: str, array: Any) -> jax.Array:
    """Puts an array on the default device, whichever parameter it is."""
    return jax.device_put(array)


def padded(shapes: Mapping[str, Any], place: Place) -> Place:
    """`place` with zeros after each row of the weights that are `Padded` in `shapes`, by path."""

    def laid_out(path: str, array: Any) -> Any:
        shape = shapes.get(path)
        if not isinstance(shape, Padded):
            return place(path, array)
        values = empty_aligned(shape.values.shape, array.dtype)
        values[:, : shape.width] = np.asarray(array)
        values[:, shape.width :] = 0
        return Padded(place(f"{path}/part", values), shape.width)

    return laid_out
