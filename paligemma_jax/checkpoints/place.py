"""Where a parameter goes once it is read."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from paligemma_jax.checkpoints import packed, safetensors
from paligemma_jax.models.padded import Padded, padding

Place = Callable[[str, Any], Any]  # (path, array) -> what the parameter tree holds


def on_device(path: str, array: Any) -> jax.Array:
    """Puts an array on the default device, whichever parameter it is."""
    return jax.device_put(array)


def padding_of(path: str, weight: Any, num_rows: int) -> int:
    """The `padding` of a parameter, an array or its shape: only the decoder's weights meet few rows enough."""
    return padding(weight, num_rows) if packed.of_decoder(path) else 0


def padded(num_rows: int, place: Place) -> Place:
    """`place` with the decoder's weights laid out for products with so many rows."""

    def laid_out(path: str, array: Any) -> Any:
        more = padding_of(path, array, num_rows)
        if not more:
            return place(path, array)
        num_outputs, width = array.shape
        values = safetensors.empty_aligned((num_outputs, width + more), array.dtype)
        values[:, :width] = np.asarray(array)
        values[:, width:] = 0
        return Padded(place(f"{path}/part", values), width)

    return laid_out
