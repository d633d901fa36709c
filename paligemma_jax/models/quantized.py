"""Linear weights in 8 and 4 bits, and their product with activations that are rounded to 8 bits on the way.

A weight [F, D] is `scale[f] * multiplier[f, g] * number[f, d]`. In 8 bits there are no multipliers. In 4 bits each
group of inputs has a small whole one, so that what is multiplied is 8 bits wide in both cases: one product serves them,
but for few rows on CPU. Where a weight does not round, activations stay as they are.

Axes: M rows, F outputs, D inputs, G groups of inputs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paligemma_jax import measured
from paligemma_jax.models import cpu, few_rows
from paligemma_jax.models.padded import Padded

BITS = {"int8": 8, "int4": 4}

_MOST_8 = 127
_MOST_4 = 7
_MOST_MULTIPLIER = _MOST_8 // _MOST_4
_GROUP = 128  # inputs that share a multiplier, fewer where half the width is no multiple of it
_TILE = 1 << 22  # 4-bit weights that are unpacked at once, so that they stay in a cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [F, D] in few bits.

    values: the numbers, i8 [F, D] or plus 128 as u8 [F, D]: `values_dtype` tells which is fast; or u8 [F, D / 2] of two
      4-bit numbers plus 8, input d low, input d + D / 2 high.
    scale: f32 [F].
    multiplier: i8 [F, G] of the 4-bit form, else None.
    dtype: of the numbers that it stands for.
    rounds: whether activations are rounded to 8 bits to be multiplied with it; else the numbers take `dtype`.
    """

    values: jax.Array
    scale: jax.Array
    multiplier: jax.Array | None
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    rounds: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D), as if it were an array."""
        num_outputs, width = self.values.shape
        return num_outputs, width if self.multiplier is None else 2 * width

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Weight = jax.Array | Quantized | Padded  # [F, D]


def values_dtype() -> np.dtype:
    """The dtype of 8-bit values that is multiplied fast here: unsigned on most CPUs, see `cpu.unsigned_is_fast`."""
    return np.dtype(np.uint8 if jax.default_backend() == "cpu" and cpu.unsigned_is_fast() else np.int8)


def quantization_of(weight: Quantized) -> str:
    """ "int8" or "int4"."""
    return "int8" if weight.multiplier is None else "int4"


def quantize(weight: jax.Array, bits: int, rounds: bool = True) -> Quantized:
    """Round a weight [F, D] to the nearest of 8 bits, one scale per output, or of 4 bits in groups of inputs."""
    return dataclasses.replace(_QUANTIZE[bits](weight), rounds=rounds)


def abstract(weight: jax.ShapeDtypeStruct, bits: int, rounds: bool = True) -> Quantized:
    """What `quantize` gives, as shapes and dtypes only."""
    return dataclasses.replace(jax.eval_shape(_QUANTIZE[bits], weight), rounds=rounds)


# What follows is compiled in parts: as one program, XLA on CPU works the largest values out again for every number.


def _quantize_8(weight: jax.Array) -> Quantized:
    scale = _scale(_largest(weight, weight.shape[1]), _MOST_8)
    return Quantized(as_values(_rounded_8(weight, scale), values_dtype()), scale, None, weight.dtype)


def _quantize_4(weight: jax.Array) -> Quantized:
    largest = _largest(weight, math.gcd(weight.shape[1] // 2, _GROUP))
    scale = _scale(largest, _MOST_4 * _MOST_MULTIPLIER)
    multiplier = _multiplier(largest, scale)
    return Quantized(_packed_4(_rounded_4(weight, scale, multiplier)), scale, multiplier, weight.dtype)


_QUANTIZE = {8: _quantize_8, 4: _quantize_4}


@functools.partial(jax.jit, static_argnums=1)
def _largest(weight: jax.Array, group: int) -> jax.Array:
    """Largest size in each group of inputs: f32 [F, G]."""
    sizes = jnp.abs(weight.astype(jnp.float32))
    return jnp.max(sizes.reshape(weight.shape[0], -1, group), axis=2)


@functools.partial(jax.jit, static_argnums=1)
def _scale(largest: jax.Array, most: int) -> jax.Array:
    largest = jnp.max(largest, axis=1)
    return jnp.where(largest > 0, largest / most, 1.0)


@jax.jit
def _multiplier(largest: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.ceil(largest / (_MOST_4 * scale[:, None]) - 1e-3), 1, _MOST_MULTIPLIER).astype(jnp.int8)


@jax.jit
def _rounded_8(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(weight.astype(jnp.float32) * (1 / scale)[:, None]).astype(jnp.int8)


@jax.jit
def _rounded_4(weight: jax.Array, scale: jax.Array, multiplier: jax.Array) -> jax.Array:
    """The 4-bit numbers plus 8: u8 [F, D]."""
    grouped = weight.astype(jnp.float32).reshape(*multiplier.shape, -1)
    numbers = jnp.round(grouped / (scale[:, None] * multiplier)[:, :, None])
    return (jnp.clip(numbers, -_MOST_4, _MOST_4) + 8).astype(jnp.uint8).reshape(weight.shape)


@jax.jit
def _packed_4(numbers: jax.Array) -> jax.Array:
    low, high = jnp.split(numbers, 2, axis=1)
    return low | high << 4


def as_values(numbers: jax.Array, dtype: np.dtype) -> jax.Array:
    """Numbers as i8, or plus 128 as u8, in the other of these forms; the array itself if it is in this one already."""
    return numbers if numbers.dtype == dtype else _flipped(numbers)


@jax.jit
def _flipped(numbers: jax.Array) -> jax.Array:
    other = jnp.uint8 if numbers.dtype == jnp.int8 else jnp.int8
    return lax.bitcast_convert_type(lax.bitcast_convert_type(numbers, jnp.uint8) ^ jnp.uint8(128), other)


def _whole(weight: Quantized, dtype: np.dtype) -> list[jax.Array]:
    """The whole numbers that `scale` makes weights of, as i8 or plus 128 as u8: [F, D], or its left and right half.

    The halves of the 4-bit form stay apart: putting them together would take longer than multiplying them.
    """
    if weight.multiplier is None:
        return [as_values(weight.values, dtype)]
    numbers = weight.values & 15, weight.values >> 4
    multipliers = jnp.split(weight.multiplier, 2, axis=1)

    def half(numbers: jax.Array, multiplier: jax.Array) -> jax.Array:
        grouped = (numbers.astype(jnp.int8) - jnp.int8(8)).reshape(*multiplier.shape, -1)
        return as_values((grouped * multiplier[:, :, None]).reshape(numbers.shape), dtype)

    return [half(*pair) for pair in zip(numbers, multipliers, strict=True)]


def rows_of(weight: Weight, index: jax.Array) -> jax.Array:
    """Some rows [..., D] of a weight, in few bits or not, as numbers of its dtype."""
    if isinstance(weight, Padded):
        return jnp.take(weight.values, index, axis=0)[..., : weight.width]
    if not isinstance(weight, Quantized):
        return jnp.take(weight, index, axis=0)
    chosen = jax.tree.map(lambda part: jnp.take(part, index.reshape(-1), axis=0), weight)
    numbers = jnp.concatenate(_whole(chosen, np.dtype(np.int8)), axis=1).astype(jnp.float32) * chosen.scale[:, None]
    return numbers.astype(weight.dtype).reshape(*index.shape, -1)


def product(x: jax.Array, weight: Quantized) -> jax.Array:
    """Activations [M, D] times a weight: float32 [M, F].

    Each row is rounded to 8 bits with a scale of its own; sums are exact. A weight that does not round is multiplied as
    numbers of its dtype, which has room for all of its whole ones.
    """
    if not weight.rounds:
        x, values = lax.optimization_barrier((x, weight.values))  # or all weights of a network would be widened at once
        numbers = jnp.concatenate(_whole(dataclasses.replace(weight, values=values), np.dtype(np.int8)), axis=1)
        return cpu.product(x.astype(weight.dtype), numbers.astype(weight.dtype)) * weight.scale[None]
    x = x.astype(jnp.float32)
    scale = jnp.maximum(cpu.largest(jnp.abs(x)), 1e-30) / _MOST_8
    rounded = jnp.round(x / scale).astype(jnp.int8)
    if weight.multiplier is None:
        y = cpu.whole_product(rounded, as_values(weight.values, values_dtype()))
    elif sums_win(weight, len(x)):
        y = few_rows.packed_product(rounded, weight.values, weight.multiplier)
    else:
        # The loop starts with zeros made from x, or XLA would make room for the results of all layers at once.
        start = jnp.broadcast_to((scale < 0).astype(jnp.int32), (x.shape[0], weight.shape[0]))
        y = _packed_product_by_kernel(rounded, weight, start)
    return y.astype(jnp.float32) * scale * weight.scale[None]


def sums_win(weight: Quantized, num_rows: int) -> bool:
    """Whether rows times a weight, which may be a shape, are fastest as the sums of `few_rows`."""
    if weight.multiplier is None:
        return cpu.sums_win(weight.values, num_rows)
    num_groups = weight.multiplier.shape[1]
    width = weight.shape[1]
    if not cpu.mostly_reads(weight, num_rows) or not few_rows.fits_groups(width // num_groups):
        return False
    return cpu.clearly_less(_packed_times(width, num_groups), num_rows)


def seconds(weight: Quantized, num_rows: int) -> float:
    """About how long one row, or `few_rows.MOST`, times a weight that rounds take on a CPU; it may be a shape."""
    if weight.multiplier is None:
        return cpu.seconds(weight.values, num_rows)
    width = weight.shape[1]
    least = cpu.least_of(_packed_times(width, weight.multiplier.shape[1]), num_rows)
    return least * weight.size / (width * cpu.num_measured(width // 2))


@functools.cache
def _packed_times(width: int, num_groups: int) -> list[float]:
    """Seconds for one row and for `few_rows.MOST` times a weight in 4 bits by tiles and as sums."""

    def calls() -> list[measured.Call]:
        num_outputs = cpu.num_measured(width // 2)
        values = jnp.zeros((num_outputs, width // 2), jnp.uint8)
        multiplier = jnp.zeros((num_outputs, num_groups), jnp.int8)
        weight = Quantized(values, jnp.ones(num_outputs), multiplier, jnp.dtype(jnp.float32))
        most = jnp.zeros((few_rows.MOST, width), jnp.int8)
        starts = [jnp.zeros((rows, num_outputs), jnp.int32) for rows in (1, len(most))]
        tiles = [(_packed_product_by_kernel, most[: len(start)], weight, start) for start in starts]
        return [*tiles, *((few_rows.packed_product, x, values, multiplier) for x in (most[:1], most))]

    with jax.ensure_compile_time_eval():
        return measured.remembered(f"4 bits of {width} inputs in {num_groups} groups", 4, calls)


def _packed_product_by_kernel(x: jax.Array, weight: Quantized, start: jax.Array) -> jax.Array:
    """Product i32 [M, F] of x [M, D] and the whole numbers of a weight in 4 bits; `start` is as in `_by_tiles`."""
    on_cpu = jax.default_backend() == "cpu"
    y = _by_tiles(x, weight, start) if on_cpu else _sum_of_products(x, weight)
    return cpu.without_offset(y, x, values_dtype())


def _sum_of_products(x: jax.Array, weight: Quantized) -> jax.Array:
    """The same but for what the 128 in unsigned numbers add."""
    halves = zip(jnp.split(x, 2, axis=1), _whole(weight, values_dtype()), strict=True)
    return sum(cpu.kernel(values_dtype())(*pair) for pair in halves)


def _by_tiles(x: jax.Array, weight: Quantized, start: jax.Array) -> jax.Array:
    """The same, a tile of outputs at a time written over `start` [M, F], so that few unpacked weights are about."""
    num_outputs = weight.shape[0]
    count = -(-weight.size // _TILE)
    if count == 1:
        return _sum_of_products(*lax.optimization_barrier((x, weight)))  # or those of all layers are unpacked at once
    rows = min(num_outputs, 16 * -(-num_outputs // (16 * count)))

    def write_tile(i: jax.Array, y: jax.Array) -> jax.Array:
        first = jnp.minimum(i * rows, num_outputs - rows)  # the last tile may work some outputs out again
        tile = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, first, rows), weight)
        return lax.dynamic_update_slice(y, _sum_of_products(x, tile), (0, first))

    return lax.fori_loop(0, -(-num_outputs // rows), write_tile, start)
