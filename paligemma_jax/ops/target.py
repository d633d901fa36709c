"""What a program is compiled for."""

import dataclasses
import functools
import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib

# XLA on CPU prefers 256-bit registers for its own loops, which are faster in 512 bits where there are such and no
# slower elsewhere. It adds floats up one after the other unless it is told that their order does not matter, which the
# GEMV kernels need; it goes on heeding what is infinite or no number.
_CPU_OPTIONS = {
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_nans": True,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine, a compiler, and how many rows are multiplied at once.

    platform: "cpu", "cuda", "rocm" or "tpu".
    processor: short name of all that the speed of a program depends on; "" off the CPU.
    cores: that a program may use.
    jaxlib: its version, which is the compiler's.
    num_rows: sequences that are decoded at once.
    """

    platform: str
    processor: str = ""
    cores: int = 1
    jaxlib: str = jaxlib.__version__
    num_rows: int = 1

    @classmethod
    def detect(cls, num_rows: int = 1) -> "Target":
        """This machine, by JAX's backend. Only code that loads a model asks, never code that is traced."""
        platform_name = jax.default_backend()
        if platform_name == "gpu":
            platform_name = "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
        if platform_name != "cpu":
            return cls(platform_name, num_rows=num_rows)
        return cls("cpu", _processor_digest(), _cores(), num_rows=num_rows)

    @property
    def compiler_options(self) -> dict[str, int | bool]:
        """What XLA is told beside a program."""
        return _CPU_OPTIONS if self.platform == "cpu" else {}


def processor() -> str:
    """What Linux knows of the first processor, "" elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""


@functools.cache
def _processor_digest() -> str:
    first = processor() or platform.processor()
    kept = [line for line in first.splitlines() if line.startswith(("cpu family", "model", "stepping", "flags"))]
    return hashlib.sha256("\n".join(kept or [first, platform.machine()]).encode()).hexdigest()[:12]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
