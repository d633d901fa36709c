"""Where the time of a generation goes, compilation apart."""

import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.compiling import compiled


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of an answer went; rows of one call share all but `new_tokens`."""

    compile_s: float  # compiling programs that were not used before
    prefill_ms: float  # from pixels and ids to the first token, picture encoder included; the mean over batches
    decode_ms_per_token: float | None  # one step of a whole batch; None when the first token was the last
    new_tokens: int


Programs = dict[Hashable, jax.stages.Compiled]  # by function, shapes and static arguments


class Clock:
    """Calls compiled functions and adds up where the time goes.

    `programs` outlive the clock: those that its owner has called before. `compile_s` was spent on them already.
    """

    def __init__(self, programs: Programs, compile_s: float = 0.0):
        self._programs = programs
        self._compile_s = compile_s
        self._run_s: dict[str, list[float]] = {}  # of each call, by the function's name
        self._decode_steps = 0

    def call(self, function: Callable[..., Any], params: Any, *args: Any, **static: Any) -> Any:
        """function(params, *args, **static), finished; a program that is new is compiled apart first."""
        start = time.perf_counter()
        program = self._program(function, params, args, static)
        ready = time.perf_counter()
        result = jax.block_until_ready(program(params, *args))
        self._compile_s += ready - start
        self._run_s.setdefault(function.__name__, []).append(time.perf_counter() - ready)
        self._decode_steps += static.get("num_steps", 0)
        return result

    def _program(
        self, function: Callable[..., Any], params: Any, args: tuple[Any, ...], static: dict[str, Any]
    ) -> jax.stages.Compiled:
        leaves, structure = jax.tree.flatten(args)
        key = (function, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(static.items()))
        if key not in self._programs:
            self._programs[key] = compiled(function, params, *args, **static)
        return self._programs[key]

    def add_steps(self, count: int) -> None:
        """Count decode steps that a call gave without naming their number."""
        self._decode_steps += count

    def timing(self, new_tokens: int) -> Timing:
        """What the calls of a generation add up to."""
        decode_s = sum(self._run_s.get("decode", []))
        rest_s = sum(map(sum, self._run_s.values())) - decode_s
        return Timing(
            compile_s=self._compile_s,
            prefill_ms=1e3 * rest_s / len(self._run_s["prefill"]),
            decode_ms_per_token=1e3 * decode_s / self._decode_steps if self._decode_steps else None,
            new_tokens=new_tokens,
        )


class Rehearsed(Exception):
    """Every program of a generation is compiled."""


class Rehearsal(Clock):
    """Compiles what is called and runs nothing: results are zeros, and the first decode step ends it by `Rehearsed`.

    Parameters need shapes only (`jax.ShapeDtypeStruct`), so that programs can be compiled before the weights are there.
    """

    def call(self, function: Callable[..., Any], params: Any, *args: Any, **static: Any) -> Any:
        program = self._program(function, params, args, static)
        if function.__name__ == "decode":
            raise Rehearsed
        return jax.tree.map(_zeros, program.out_info)


def _zeros(x: Any) -> jax.Array | np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return np.zeros(x.shape, x.dtype)
