"""Write a released variant with random weights, as a Hugging Face directory: real sizes without a download.

    python benchmarks/random_checkpoint.py --variant paligemma2-3b-224 --tokenizer PATH/tokenizer.model --out DIR

The weights keep activations of unit size, so that half precision stays finite; what such a model says means nothing.
The tensors of one file, 2 GB, are in memory at a time.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paligemma_jax import checkpoints
from paligemma_jax.checkpoints.arrays import dtype_named
from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import UserError
from paligemma_jax.files import replacing
from paligemma_jax.processing.image import ImageSettings
from paligemma_jax.processing.tokenizer import Tokenizer

_BLOCK = 4194301  # a prime: no two rows of a weight begin at the same number


@functools.cache
def _block(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(_BLOCK, np.float32)


@dataclasses.dataclass(frozen=True)
class RandomArray:
    """An array that is drawn when `np.asarray` asks for it.

    Normal numbers cost a minute per billion, so one block of them is repeated from a place that depends on the name.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    seed: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        start = zlib.crc32(self.path.encode()) % _BLOCK
        mean, std = self._moments()
        block = np.roll((mean + std * _block(self.seed)).astype(dtype or self.dtype), start)
        return np.resize(block, self.shape)

    def _moments(self) -> tuple[float, float]:
        if len(self.shape) > 1:
            # A smaller table, since it is tied: else every token predicts itself and answers repeat one word.
            gain = 0.3 if "embed_tokens" in self.path else 1.0
            return 0.0, gain * math.prod(self.shape[1:]) ** -0.5
        is_layer_norm = self.path.endswith(("layer_norm1/weight", "layer_norm2/weight", "post_layernorm/weight"))
        return (1.0, 0.1) if is_layer_norm else (0.0, 0.1)  # Gemma's norms add the 1 themselves


def write(variant: str, tokenizer: Path, out: Path, dtype: str, seed: int) -> None:
    """Write the checkpoint `variant` to the directory `out`."""
    config = VARIANTS[variant]
    pieces = Tokenizer.from_file(tokenizer)
    pieces.check(config)
    stored = dtype_named(dtype)
    shapes = checkpoints.expected_shapes(config)
    arrays = {path: RandomArray(path, shape, stored, seed) for path, shape in shapes.items()}
    checkpoints.save(out, config, unflatten_dict(arrays, sep="/"))
    with replacing(out / "tokenizer.model") as temporary:
        temporary.write_bytes(pieces.to_bytes())
    ImageSettings(config.vision.image_size).save(out, config.vision.num_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", required=True, choices=VARIANTS)
    parser.add_argument("--tokenizer", required=True, type=Path, help="SentencePiece model of PaliGemma")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        write(args.variant, args.tokenizer, args.out, args.dtype, args.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e9:.1f} GB of {args.variant} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
