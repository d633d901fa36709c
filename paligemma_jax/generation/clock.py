"""Where the time of a generation goes, compilation apart."""

import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of an answer went; rows of one call share all but `new_tokens`."""

    compile_s: float  # compiling programs that were not used before
    prefill_ms: float  # from pixels and ids to the first token, picture encoder included; the mean over batches
    decode_ms_per_token: float | None  # one step of a whole batch; None when the first token was the last
    new_tokens: int


class Clock:
    """Calls compiled functions and adds up where the time goes.

    `seen` outlives the clock: the programs that its owner has called before.
    """

    def __init__(self, seen: set[Hashable]):
        self._seen = seen
        self._compile_s = 0.0
        self._run_s: dict[str, list[float]] = {}  # of each call, by the function's name
        self._decode_steps = 0

    def call(self, function: Callable[..., Any], params: Any, *args: Any, **static: Any) -> Any:
        """function(params, *args, **static), finished; a program that is new is compiled apart first."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        program = (function, structure, shapes, tuple(static.items()))
        start = time.perf_counter()
        if program not in self._seen:
            function.lower(params, *args, **static).compile()
            self._seen.add(program)
        compiled = time.perf_counter()
        result = jax.block_until_ready(function(params, *args, **static))
        self._compile_s += compiled - start
        self._run_s.setdefault(function.__name__, []).append(time.perf_counter() - compiled)
        self._decode_steps += static.get("num_steps", 0)
        return result

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
