"""How programs are compiled."""

from typing import Any

import jax

# By platform. XLA on CPU prefers 256-bit registers for its own loops; those of `models/one_row.py` and much of the rest
# are faster in 512 bits where there are such, and no slower elsewhere.
_OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


def compiled(function: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
    """A function of `jax.jit` compiled for some arguments, which may be shapes; call it with the arrays alone."""
    return function.lower(*args, **static).compile(_OPTIONS.get(jax.default_backend()))
