"""Print what the released models take: parameters, weights in each number format, key-value cache of one prompt.

    python benchmarks/model_sizes.py

Everything is computed from shapes; nothing is downloaded, allocated or measured. GB are 1e9 bytes. The token table has
257216 rows, as in the hub's files. Weights are what `pj.load` keeps; in bfloat16 they are also the download. The cache
is that of one row in bfloat16: the image's tokens, 16 of a prompt and 100 of an answer.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints import big_vision
from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.files import write_text

_OUT = Path(__file__).resolve().parent / "results" / "model_sizes.md"
_HEAD = """# What the released models take

By `python benchmarks/model_sizes.py`, which says how it is computed.

"""
_PROMPT_AND_ANSWER = 16 + 100  # tokens
_COLUMNS = ["model", "px", "parameters", "bf16, GB", "int8, GB", "int4, GB", "image tokens", "cache of a row, GB"]


def weight_bytes(config: PaliGemmaConfig, quantization: str | None) -> int:
    """Bytes of all arrays that loading a model as bfloat16, or quantized, gives."""
    contents = big_vision.Contents(Path(), config, {})  # the geometry is all that shapes need
    leaves = jax.tree.leaves(checkpoints.abstract(contents, "bfloat16", quantization))
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def cache_bytes(config: PaliGemmaConfig) -> int:
    """Bytes of the keys and values of one row."""
    text = config.text
    numbers = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    return numbers * (config.vision.num_tokens + _PROMPT_AND_ANSWER) * jnp.dtype(jnp.bfloat16).itemsize


def main() -> int:
    rows = [_COLUMNS, ["---"] * len(_COLUMNS)]
    for name, config in VARIANTS.items():
        sizes = [f"{weight_bytes(config, quantization) / 1e9:.2f}" for quantization in (None, "int8", "int4")]
        model, _, side = name.rpartition("-")
        count = f"{checkpoints.parameter_count(config):,}"
        rows.append([model, side, count, *sizes, str(config.vision.num_tokens), f"{cache_bytes(config) / 1e9:.3f}"])
    text = _HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    write_text(_OUT, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
