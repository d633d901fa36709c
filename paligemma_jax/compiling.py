"""How programs are compiled."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

# By platform. XLA on CPU prefers 256-bit registers for its own loops, which are faster in 512 bits where there are such
# and no slower elsewhere. It adds floats up one after the other unless it is told that their order does not matter; it
# goes on heeding what is infinite or no number.
_OPTIONS = {
    "cpu": {
        "xla_cpu_prefer_vector_width": 512,
        "xla_cpu_enable_fast_math": True,
        "xla_cpu_fast_math_honor_division": True,
        "xla_cpu_fast_math_honor_functions": True,
        "xla_cpu_fast_math_honor_infs": True,
        "xla_cpu_fast_math_honor_nans": True,
    }
}


def compiled(function: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
    """A function of `jax.jit` compiled for some arguments, which may be shapes; call it with the arrays alone."""
    lowered = function.lower(*args, **static)
    _release()
    program = lowered.compile(_OPTIONS.get(jax.default_backend()))
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
