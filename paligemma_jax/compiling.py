"""How programs are compiled."""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import get_compile_options

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

# LLVM's, which no program can be given alone: loops over bytes take 64 of them at once, for which there are dot-product
# instructions, instead of the 16 whose sums fill a register. A version without the option would end the process.
_WIDE_LOOPS = "-vectorizer-maximize-bandwidth"
_LLVM_OPTIONS = "--xla_backend_extra_options"
_WITH_WIDE_LOOPS = ((0, 12), (0, 13))  # versions of JAX: the first one that gains, and the first one not tried

# Where JAX looks for other platforms.
_PLUGIN_VARIABLES = "PJRT_NAMES_AND_LIBRARY_PATHS", "TPU_LIBRARY_PATH"
_PLUGIN_MODULES = "jax_plugins", "libtpu"


def use_wide_loops(platform: str) -> None:
    """Have all programs of this process compiled for 8-bit dot-product instructions (VNNI), if it is one on a CPU that
    has them and JAX is of a version that gains by it.

    It does so by the environment variable XLA_FLAGS, which JAX reads when it is first asked for its devices: call this
    before, and in a process of one's own. Steps of 5 to 16 answers in 8 bits gain by it; other loops were not seen to
    change.

    Args:
      platform: of the process, "auto" for what JAX finds.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if _LLVM_OPTIONS in flags or (flags and not flags.startswith("-")):  # XLA takes other text for a file of flags
        return
    first, end = _WITH_WIDE_LOOPS
    if first <= jax.__version_info__ < end and _is_cpu(platform) and "avx512_vnni" in processor():
        os.environ["XLA_FLAGS"] = f"{flags} {_LLVM_OPTIONS}={_WIDE_LOOPS}".strip()


def uses_wide_loops() -> bool:
    """Whether XLA has read that `use_wide_loops`, or the user, said so."""
    options = get_compile_options(num_replicas=1, num_partitions=1)
    return _WIDE_LOOPS.encode() in options.SerializeAsString()


def processor() -> str:
    """What Linux knows of the first processor, "" elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""


def _is_cpu(platform: str) -> bool:
    """Whether a platform is surely the CPU, without asking JAX for it."""
    if platform == "auto":
        platform = jax.config.jax_platforms
    if platform:
        return platform == "cpu"
    if any(map(os.environ.get, _PLUGIN_VARIABLES)) or any(map(importlib.util.find_spec, _PLUGIN_MODULES)):
        return False
    return not importlib.metadata.entry_points(group="jax_plugins")


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
