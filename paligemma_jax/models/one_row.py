"""Products of one row with a large weight, spelt out as sums that XLA on CPU compiles into one loop over the weight.

XLA's own kernels want several rows, and whole bytes for numbers. This loop reads the weight once, in the order of its
memory, and takes it apart in registers: all that a step of decoding one answer should cost.

Axes: F outputs, D inputs, C blocks of W inputs, which are L lanes taken W / L times.
"""

import functools
import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

_UNIT = 64  # inputs that widths and groups are whole multiples of, and of two numbers each are folded at once
_LANES = 16  # float32 sums that fit in one register; with more, a row would be walked over several times
_FOLD = 15 * _LANES  # inputs that are folded at once: XLA fuses no more than 15 parts of one array into a loop
# The longest blocks: XLA compiles longer ones slowly, or not into a loop. Rows of more than twice _MOST numbers are
# faster in shorter ones; packed blocks are counted in bytes of two numbers.
_MOST, _MOST_OF_LONG, _MOST_PACKED = 1152, 768, 640


def fits(width: int) -> bool:
    """Whether rows of so many inputs can be cut into blocks."""
    return width % _UNIT == 0


def fits_packed(width: int, num_groups: int) -> bool:
    """The same of a weight in 4 bits, whose groups of inputs must not be odd or long ones."""
    group = width // num_groups
    return group % _UNIT == 0 and group <= _MOST_PACKED


def product(row: jax.Array, weight: jax.Array) -> jax.Array:
    """Row [D] times a weight [F, D]: float32 [F]."""
    row, weight = lax.optimization_barrier((row, weight))  # together, or a loop around would widen the weight ahead
    num_outputs, width = weight.shape
    block = _block(width, _UNIT, _MOST if width <= 2 * _MOST else _MOST_OF_LONG)
    weight = weight.reshape(num_outputs, -1, block)
    row = row.astype(jnp.float32).reshape(-1, block)

    def part(k: int) -> jax.Array:
        inputs = slice(k, min(k + _FOLD, block))
        return _folded(_outputs_inside(weight[:, :, inputs]).astype(jnp.float32) * row[:, None, inputs])

    return _sum_of_lanes(_sum(part(k) for k in range(0, block, _FOLD)))


def packed_product(row: jax.Array, values: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Row f32 [D] times the whole numbers of a weight in 4 bits: float32 [F].

    `values` u8 [F, D / 2] and `multiplier` i8 [F, G] are as in `quantized.Quantized`.
    """
    row, values, multiplier = lax.optimization_barrier((row, values, multiplier))
    num_outputs, width = values.shape
    group = 2 * width // multiplier.shape[1]
    block, unit = _block(width, group, _MOST_PACKED), math.gcd(group, _UNIT)
    values = values.reshape(num_outputs, -1, block)
    row = row.reshape(2, -1, block)
    multiplier = multiplier.astype(jnp.float32).reshape(num_outputs, 2, -1, block // group)

    def part(half: int, k: int) -> jax.Array:
        inputs = slice(k, k + unit)
        some = _outputs_inside(values[:, :, inputs])
        numbers = (some >> 4 if half else some & 15).astype(jnp.int8) - jnp.int8(8)
        products = numbers.astype(jnp.float32) * row[half, :, None, inputs]
        return _folded(products) * _outputs_inside(multiplier[:, half, :, k // group, None])

    return _sum_of_lanes(_sum(part(half, k) for k in range(0, block, unit) for half in (0, 1)))


def _block(width: int, unit: int, most: int) -> int:
    """The longest block of whole units that divides a width and is no longer than `most`, but for one unit."""
    count = width // unit
    return unit * max((n for n in range(1, most // unit + 1) if count % n == 0), default=1)


def _outputs_inside(x: jax.Array) -> jax.Array:
    """[F, C, L] as [C, F, L]: the loop stays with some inputs for all outputs, which keeps the row in the cache."""
    return x.transpose(1, 0, 2)


def _folded(x: jax.Array) -> jax.Array:
    """Sums over the last axis [C, F, W] but for the lanes: [C, F, L]."""
    lanes = math.gcd(x.shape[-1], _LANES)
    return _sum(x[:, :, k : k + lanes] for k in range(0, x.shape[-1], lanes))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _sum_of_lanes(sums: jax.Array) -> jax.Array:
    """Sums [C, F, L] to [F]; a product with ones is the fast way to add neighbours."""
    num_blocks, num_outputs, lanes = sums.shape
    over_lanes = (((1,), (0,)), ((), ()))
    blocks = lax.dot_general(sums.reshape(-1, lanes), jnp.ones(lanes, jnp.float32), over_lanes, precision="highest")
    return jnp.sum(blocks.reshape(num_blocks, num_outputs), axis=0)
