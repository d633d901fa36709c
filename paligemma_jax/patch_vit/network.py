"""A network with its parameters, run on batches of any size by few compiled programs.

Axes: B rows.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax import ops
from paligemma_jax.buckets import power_of_two

MOST_ROWS = 64  # of one program; more are split


class Network:
    """A module and its parameters for a target; `parameters` may be shared."""

    def __init__(self, module: nn.Module, params: Any, target: ops.Target | None = None):
        self.module, self.params = module, params
        self._target = target or ops.Target.detect()
        self._programs: dict[tuple[Any, ...], jax.stages.Compiled] = {}

    def __call__(self, method: str, rows: np.ndarray) -> Any:
        """A method of the module for rows [B, ...]: the arrays of its result as numpy, each [B, ...]."""
        parts = [self._run(method, rows[i : i + MOST_ROWS]) for i in range(0, max(1, len(rows)), MOST_ROWS)]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts) if len(parts) > 1 else parts[0]

    def _run(self, method: str, rows: np.ndarray) -> Any:
        size = power_of_two(max(1, len(rows)))
        padded = np.zeros((size, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        key = (method, padded.shape, padded.dtype)
        if key not in self._programs:
            self._programs[key] = ops.compiled(self._target, _apply, self.module, method, self.params, padded)
        out = self._programs[key](self.params, padded)
        return jax.tree.map(lambda array: np.asarray(array)[: len(rows)], out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(module: nn.Module, method: str, params: Any, rows: jax.Array) -> Any:
    return apply(module, params, rows, method=method)


def apply(module: nn.Module, params: Any, *args: Any, method: str = "__call__") -> Any:
    """A method of a module; matmuls with float32 weights are true float32 on every platform."""
    single = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    with jax.default_matmul_precision("highest" if single else None):
        return module.apply({"params": params}, *args, method=method)
