"""Programs compiled for a target."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from paligemma_jax.ops.target import Target


def compiled(target: Target, function: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
    """A function of `jax.jit` compiled for some arguments, which may be shapes; call it with the arrays alone."""
    return compile_traced(target, function.trace(*args, **static))


def compile_traced(target: Target, traced: jax.stages.Traced) -> jax.stages.Compiled:
    """A function that `jax.jit` has traced, compiled."""
    lowered = traced.lower()
    _release()
    program = lowered.compile(target.compiler_options or None)
    _release()
    return program


def _release() -> None:
    """Give the system back what programs and compiling have freed: glibc would keep 100 MB and more.

    A process is largest while it compiles.
    """
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError):  # of another C library
        if sys.platform == "linux":
            return ctypes.CDLL(None).malloc_trim
    return None
