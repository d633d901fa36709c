"""Print what the released models take: parameters, weights in each number format, key-value cache, also of a server.

    python benchmarks/model_sizes.py

Everything is computed from shapes; nothing is downloaded, allocated or measured. GB are 1e9 bytes. The token table has
257216 rows, as in the hub's files. Weights are what `pj.load` keeps; in bfloat16 they are also the download. The cache
is that of one row in bfloat16: the image's tokens, 16 of a prompt and 100 of an answer. A server's is that of all slots
with its default settings.
"""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paligemma_jax import checkpoints, ops
from paligemma_jax.checkpoints import big_vision
from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.files import write_text
from paligemma_jax.serving.programs import Programs
from paligemma_jax.serving.settings import EngineSettings

_OUT = Path(__file__).resolve().parent / "results" / "model_sizes.md"
_HEAD = """# What the released models take

By `python benchmarks/model_sizes.py`, which says how it is computed.

"""
_PROMPT_AND_ANSWER = 16 + 100  # tokens
_SERVER_HEAD = """
## The cache of a server

With the default settings, in bfloat16. Usually each slot has room for an image, a short prompt and a short answer;
while a request runs that needs more, for the largest that may come. On the way from one to the other both are there.

"""
_SERVER_COLUMNS = ["model", "px", "a token, kB", "usual tokens", "GB", "most tokens", "GB"]
_COLUMNS = ["model", "px", "parameters", "bf16, GB", "int8, GB", "int4, GB", "image tokens", "cache of a row, GB"]


def weight_bytes(config: PaliGemmaConfig, quantization: str | None) -> int:
    """Bytes of all arrays that loading a model as bfloat16, or quantized, gives."""
    contents = big_vision.Contents(Path(), config, {})  # the geometry is all that shapes need
    leaves = jax.tree.leaves(checkpoints.abstract(contents, "bfloat16", quantization))
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def token_bytes(config: PaliGemmaConfig) -> int:
    """Bytes of the keys and values of one token."""
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * jnp.dtype(jnp.bfloat16).itemsize


def server_table() -> list[list[str]]:
    """The cache of a server in bfloat16, for each model: usually, and while requests run that need more."""
    settings = EngineSettings()
    rows = [_SERVER_COLUMNS, ["---"] * len(_SERVER_COLUMNS)]
    for name, config in VARIANTS.items():
        processor = types.SimpleNamespace(tokenizer=types.SimpleNamespace(loc_start=0))
        runner = types.SimpleNamespace(target=ops.Target("cpu"))
        model = types.SimpleNamespace(config=config, params=None, runner=runner, processor=processor)
        programs = Programs(model, settings)  # its sizes; nothing is compiled
        row = [*name.rpartition("-")[::2], f"{token_bytes(config) / 1e3:.0f}"]
        for size in (programs.usual, programs.largest):
            row += [str(size.num_slots), f"{settings.num_slots * size.num_slots * token_bytes(config) / 1e9:.2f}"]
        rows.append(row)
    return rows


def lines_of(rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    rows = [_COLUMNS, ["---"] * len(_COLUMNS)]
    for name, config in VARIANTS.items():
        sizes = [f"{weight_bytes(config, quantization) / 1e9:.2f}" for quantization in (None, "int8", "int4")]
        model, _, side = name.rpartition("-")
        count = f"{checkpoints.parameter_count(config):,}"
        cache = (config.vision.num_tokens + _PROMPT_AND_ANSWER) * token_bytes(config)
        rows.append([model, side, count, *sizes, str(config.vision.num_tokens), f"{cache / 1e9:.3f}"])
    text = _HEAD + lines_of(rows) + _SERVER_HEAD + lines_of(server_table())
    write_text(_OUT, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
