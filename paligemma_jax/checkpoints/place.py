"""Where a parameter goes once it is read."""

from collections.abc import Callable
from typing import Any

import jax

Place = Callable[[str, Any], Any]  # (path, array) -> what the parameter tree holds


def on_device(path: str, array: Any) -> jax.Array:
    """Puts an array on the default device, whichever parameter it is."""
    return jax.device_put(array)
