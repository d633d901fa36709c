"""The machine of a benchmark: what it is, what it can do at best, and how much work a first token is."""

import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax import checkpoints
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import UserError
from paligemma_jax.files import read_json, write_json, write_text
from paligemma_jax.ops import processor

_PACKAGES = ("jax", "jaxlib", "torch", "transformers")
_INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16"}
_RUNS = 10  # of what gives a ceiling, one after the other without a pause


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GB, and versions; None for what is not installed."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


@functools.cache
def their_versions(python: str) -> dict[str, str | None]:
    """Versions of what theirs runs on, as its interpreter knows them; None for what it has not.

    Raises:
      UserError: this is no interpreter.
    """
    program = (
        "import importlib.metadata, json, platform\n"
        "names = {found.name for found in importlib.metadata.distributions()} & {'torch', 'transformers'}\n"
        "found = {name: importlib.metadata.version(name) for name in names}\n"
        "print(json.dumps({'torch': None, 'transformers': None, 'their_python': platform.python_version()} | found))"
    )
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--their-python {python}: {error}") from error
    return json.loads(done.stdout)


def keep(out: Path, name: str, entry: dict[str, Any], document: Callable[[dict[str, Any]], str]) -> None:
    """Put what was measured in the place of what was known about a model, in OUT.json and OUT.md, and print it."""
    data = out.with_suffix(".json")
    entries = (read_json(data) if data.exists() else {}) | {name: entry}
    write_json(data, entries)
    write_text(out.with_suffix(".md"), document(entries))
    print(document({name: entry}))


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since boot; None where /proc does not tell."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _waiting, *interrupts = map(int, path.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def ceilings() -> dict[str, float]:
    """What JAX reaches at best on its default device: memory bandwidth in GB/s, bfloat16 products in TFLOP/s."""
    large = jax.default_backend() != "cpu"
    array = jnp.zeros((2**18 if large else 2**16, 2048), jnp.float32)  # 2 GiB, or 512 MiB: more than any cache holds
    size = array.nbytes
    read_s = _seconds(
        jax.jit(lambda x, weight: _product(weight, x, jnp.float32)[:2048].T + x), jnp.ones((1, 2048)), array
    )
    copy_s = _seconds(jax.jit(lambda x: -x, donate_argnums=0), array)
    side = 8192 if large else 2048
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    b = b * side**-0.5  # random numbers of unit size stay so: zeros would be faster than real work
    sums = jnp.bfloat16 if large else jnp.float32  # what each is fast with
    matmul_s = _seconds(jax.jit(lambda x, weight: _product(x, weight, sums).astype(x.dtype)), a, b)
    return {
        "copy_gb_s": 2 * size / copy_s / 1e9,
        "read_gb_s": size / read_s / 1e9,
        "matmul_tflop_s": 2 * side**3 / matmul_s / 1e12,
    }


def first_token_flops(config: PaliGemmaConfig, num_tokens: int) -> int:
    """Floating-point operations from one picture to the first token of a prompt of `num_tokens`, its picture included.

    Two for each weight of a product and position, two for each of the two products of an attention, and the output head
    at one position.
    """
    vision, text = config.vision, config.text
    sizes = {path: math.prod(shape) for path, shape in checkpoints.expected_shapes(config).items() if len(shape) > 1}
    tables = ("embed_tokens", "position_embedding")  # looked up, not multiplied
    weights = {path: size for path, size in sizes.items() if not any(name in path for name in tables)}
    decoder = sum(size for path, size in weights.items() if path.startswith("language_model"))
    encoder = sum(weights.values()) - decoder
    attention = vision.num_layers * vision.num_tokens**2 * vision.width
    attention += text.num_layers * num_tokens**2 * text.num_heads * text.head_dim
    head = text.vocab_size * text.width
    return 2 * (encoder * vision.num_tokens + decoder * num_tokens + head) + 4 * attention


def _product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """Products of the rows of x with the rows of the weight, as in the networks."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _seconds(function: Callable[..., jax.Array], x: jax.Array, *rest: jax.Array) -> float:
    """Seconds of one function(x, *rest), the first left out; each takes the x that the one before gave."""
    x = jax.block_until_ready(function(x, *rest))
    start = time.perf_counter()
    for _ in range(_RUNS):
        x = function(x, *rest)
    jax.block_until_ready(x)
    return (time.perf_counter() - start) / _RUNS


def _cpu_model() -> str:
    """The processor's name, which may say little, and what its speed here depends on."""
    lines = (line.partition(":") for line in processor().splitlines())
    facts = {name.strip(): value.strip() for name, _, value in lines}
    flags = facts.get("flags", "").split()
    kinds = [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    return facts.get("model name", platform.processor()) + (f" ({', '.join(kinds)})" if kinds else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
