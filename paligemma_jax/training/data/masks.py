"""Masks to codes and back through the mask VQ-VAE, on the CPU: the device that trains is not kept waiting."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from paligemma_jax.models import mask_vae
from paligemma_jax.tasks.reading import NUM_CODES

_ROWS = 8  # masks that one program takes: always so many, or a code could depend on its neighbours' number


@dataclasses.dataclass
class MaskCodec:
    """The VQ-VAE, whose parameters are read when they are first needed.

    read: gives the parameters of `models.mask_vae`; CheckpointError when there are none.
    """

    read: Callable[[], mask_vae.Params]
    _params: Any = None

    def encode(self, masks: np.ndarray) -> np.ndarray:
        """Masks f32 [N, 64, 64] in 0..1 to codes i32 [N, 16]."""
        return self._in_parts(mask_vae.encode, np.asarray(masks, np.float32), (NUM_CODES,))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes i32 [N, 16] to masks f32 [N, 64, 64], positive inside."""
        return self._in_parts(mask_vae.decode, np.asarray(codes, np.int32), (64, 64))

    def _in_parts(self, function: Callable[..., Any], values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if not len(values):
            return np.zeros((0, *shape), np.float32 if len(shape) == 2 else np.int32)
        device = _cpu()
        if self._params is None:
            self._params = jax.device_put(self.read(), device)
        found = []
        for start in range(0, len(values), _ROWS):
            part = values[start : start + _ROWS]
            padded = np.concatenate([part, np.zeros((_ROWS - len(part), *part.shape[1:]), part.dtype)])
            found.append(np.asarray(function(self._params, jax.device_put(padded, device)))[: len(part)])
        return np.concatenate(found)


def _cpu() -> jax.Device | None:
    """The CPU; None, which is the default device, where JAX was told to use another platform alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
