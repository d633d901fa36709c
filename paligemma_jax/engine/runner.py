"""Compiled programs, and where the time of a call goes."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax

from paligemma_jax import ops
from paligemma_jax.sharding import Layout, put, trace
from paligemma_jax.tasks.output import Timing


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of `jax.jit` traced for the structure and shapes of its arguments, parameters included."""

    key: Hashable
    traced: jax.stages.Traced

    @property
    def result(self) -> Any:
        """What it returns, as shapes: to declare a program that takes it."""
        return self.traced.out_info


class Runner:
    """Programs of one model, each compiled once.

    Args:
      target: what programs are compiled for.
      table: the times of kernels by which the model's weights were prepared.
      layout: how parameters and states lie on several devices; None is one device.
    """

    def __init__(self, target: ops.Target, table: ops.Table | None = None, layout: Layout | None = None):
        self.target = target
        self.layout = layout
        self.table = table or ops.Table()
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}
        self._params: tuple[Any, Hashable] = (None, ())  # the last parameters and their structure, which is large

    def __len__(self) -> int:
        return len(self._compiled)

    def declare(self, function: Callable[..., Any], params: Any, *args: Any, **static: Any) -> Program:
        """The program of function(params, *args, **static), whose arguments may be shapes; nothing is compiled yet."""
        return Program(self._key(function, params, args, static), trace(self.layout, function, params, *args, **static))

    def compile(self, programs: Iterable[Program]) -> None:
        """Compile declared programs: the warm-up of a run."""
        for program in programs:
            if program.key not in self._compiled:
                self._compiled[program.key] = ops.compile_traced(self.target, program.traced)

    def get(
        self, function: Callable[..., Any], params: Any, args: tuple[Any, ...], static: dict[str, Any]
    ) -> jax.stages.Compiled:
        """The compiled program of a call, compiled now if it was not declared."""
        key = self._key(function, params, args, static)
        if key not in self._compiled:
            self.compile([Program(key, trace(self.layout, function, params, *args, **static))])
        return self._compiled[key]

    def _key(
        self, function: Callable[..., Any], params: Any, args: tuple[Any, ...], static: dict[str, Any]
    ) -> Hashable:
        if self._params[0] is not params:
            self._params = params, _structure(params)
        return function, self._params[1], _structure(args), tuple(sorted(static.items(), key=lambda item: item[0]))


def _structure(tree: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


class Call:
    """One call of the API: runs programs, and adds up where the time goes.

    Args:
      runner: of the model.
      params: its parameters.
      compile_s: seconds that were spent on compiling for this call before.
    """

    def __init__(self, runner: Runner, params: Any, compile_s: float = 0.0):
        self.params = params
        self._runner = runner
        self._compile_s = compile_s
        self._prefill_s = self._decode_s = 0.0
        self._prefills = self._decode_steps = 0

    def run(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """function(params, *args, **static), finished, as part of the time to the first token."""
        result, seconds = self._run(function, args, static)
        self._prefill_s += seconds
        return result

    def prefill(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """The same for a function that chooses the first tokens of a batch."""
        self._prefills += 1
        return self.run(function, *args, **static)

    def decode(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """The same for a function that lengthens answers; `add_steps` says by how many steps."""
        result, seconds = self._run(function, args, static)
        self._decode_s += seconds
        return result

    def add_steps(self, count: int) -> None:
        """Count decode steps, one token of every row that goes on each."""
        self._decode_steps += count

    def timing(self, new_tokens: int) -> Timing:
        """What the programs of this call add up to, for an answer of so many tokens."""
        return Timing(
            compile_s=self._compile_s,
            prefill_ms=1e3 * self._prefill_s / max(1, self._prefills),
            decode_ms_per_token=1e3 * self._decode_s / self._decode_steps if self._decode_steps else None,
            new_tokens=new_tokens,
        )

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], static: dict[str, Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        program = self._runner.get(function, self.params, args, static)
        ready = time.perf_counter()
        result = jax.block_until_ready(program(self.params, *put(self._runner.layout, args)))
        self._compile_s += ready - start
        return result, time.perf_counter() - ready
