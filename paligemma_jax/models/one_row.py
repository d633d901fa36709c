"""Products of one row with a large weight, spelt out as sums that XLA on CPU compiles into one loop over the weight.

XLA's own kernels want several rows, and whole bytes for numbers. This loop reads the weight once, almost in the order
of its memory, and takes it apart in registers: all that a step of decoding one answer should cost. Which form of it is
fastest differs between processors: `cpu` measures.

Axes: F outputs, A tiles of T outputs, D inputs, C blocks of W inputs, which are L lanes taken W / L times.
"""

import functools
import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_UNIT = 64  # inputs that widths and groups are whole multiples of
_PARTS = 15  # XLA fuses no more parts of one array into a loop


class Form(NamedTuple):
    """How a loop goes over a weight.

    lanes: sums that are kept side by side. Where they fill one register, a row is walked over once.
    longest: of the blocks. XLA compiles one of over 72 times the lanes slowly, or not into a loop.
    tile: outputs, or None for all, for which a block of inputs is done before the next one; of a number of outputs that
      it does not divide, their greatest common divisor. All keep the block of the row in the nearest cache; few keep
      the weight's pages at hand where its rows are long.
    """

    lanes: int
    longest: int
    tile: int | None


# Of weights in 4 bits, their blocks counted in bytes: the second one may be the longer program.
PACKED_FORMS = (Form(32, 640, 16), Form(32, 1152, None))
_PACKED_UNIT = 128  # numbers of each half that are folded at once


def fits(width: int) -> bool:
    """Whether rows of so many inputs can be cut into blocks."""
    return width % _UNIT == 0


def forms(width: int) -> tuple[Form, ...]:
    """The forms that may be the fastest for rows of so many inputs."""
    few_lanes = Form(16, 1152 if width <= 2 * 1152 else 768, None)  # with all outputs, shorter blocks suit long rows
    return few_lanes, Form(32, 2304, 32)


def fits_packed(width: int, num_groups: int) -> bool:
    """The same of a weight in 4 bits, whose groups of inputs must not be odd or long ones."""
    group = width // num_groups
    return group % _UNIT == 0 and group <= min(form.longest for form in PACKED_FORMS)


def product(row: jax.Array, weight: jax.Array, form: Form) -> jax.Array:
    """Row [D] times a weight [F, D]: float32 [F]."""
    row, weight = lax.optimization_barrier((row, weight))  # together, or a loop around would widen the weight ahead
    num_outputs, width = weight.shape
    block = _block(width, _UNIT, form.longest)
    weight = weight.reshape(num_outputs, -1, block)
    row = row.astype(jnp.float32).reshape(-1, block)
    fold = _PARTS * form.lanes

    def part(k: int) -> jax.Array:
        inputs = slice(k, min(k + fold, block))
        return _folded(weight[:, :, inputs].astype(jnp.float32) * row[None, :, inputs], form.lanes)

    return _sum_of_lanes(_sum(part(k) for k in range(0, block, fold)), form)


def packed_product(row: jax.Array, values: jax.Array, multiplier: jax.Array, form: Form) -> jax.Array:
    """Row f32 [D] times the whole numbers of a weight in 4 bits: float32 [F].

    `values` u8 [F, D / 2] and `multiplier` i8 [F, G] are as in `quantized.Quantized`.
    """
    row, values, multiplier = lax.optimization_barrier((row, values, multiplier))
    num_outputs, width = values.shape
    group = 2 * width // multiplier.shape[1]
    block, unit = _block(width, group, form.longest), math.gcd(group, _PACKED_UNIT)
    values = values.reshape(num_outputs, -1, block)
    rows = [half.reshape(-1, block) for half in jnp.split(row / 16, 2)]
    multipliers = [
        half.astype(jnp.float32).reshape(num_outputs, -1, block // group) for half in jnp.split(multiplier, 2, axis=1)
    ]

    def part(k: int) -> jax.Array:
        inputs = slice(k, k + unit)
        signed = values[:, :, inputs] ^ jnp.uint8(0x88)  # two's complement in place of plus 8
        sums = []
        # Each number times 16, in the upper four bits: only the low half has to be shifted.
        for shifted, half, factors in zip((signed << 4, signed & jnp.uint8(0xF0)), rows, multipliers, strict=True):
            numbers = lax.bitcast_convert_type(shifted, jnp.int8).astype(jnp.float32)
            sums.append(_folded(numbers * half[None, :, inputs], form.lanes) * factors[:, :, k // group, None])
        return sums[0] + sums[1]

    return _sum_of_lanes(_sum(part(k) for k in range(0, block, unit)), form)


def _block(width: int, unit: int, longest: int) -> int:
    """The longest block of whole units that divides a width and is no longer than `longest`, but for one unit."""
    count = width // unit
    return unit * max((n for n in range(1, longest // unit + 1) if count % n == 0), default=1)


def _folded(x: jax.Array, lanes: int) -> jax.Array:
    """Sums over the last axis [..., W] but for the lanes: [..., L]. In two steps, which are fewer instructions."""
    lanes = math.gcd(x.shape[-1], lanes)
    count = x.shape[-1] // lanes
    first = min(n for n in range(1, count + 1) if count % n == 0 and n * n >= count)
    return _in_parts(_in_parts(x, x.shape[-1] // first), lanes)


def _in_parts(x: jax.Array, width: int) -> jax.Array:
    """The sum of parts of x, each so many numbers of its last axis."""
    return _sum(x[..., k : k + width] for k in range(0, x.shape[-1], width))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _sum_of_lanes(sums: jax.Array, form: Form) -> jax.Array:
    """Sums [F, C, L] to [F], worked out in the order of the form; a product with ones adds neighbours fast."""
    num_outputs, num_blocks, lanes = sums.shape
    tile = math.gcd(num_outputs, form.tile) if form.tile else num_outputs
    ordered = sums.reshape(-1, tile, num_blocks, lanes).transpose(0, 2, 1, 3)  # [A, C, T, L]
    over_lanes = (((1,), (0,)), ((), ()))
    ones = jnp.ones(lanes, jnp.float32)
    blocks = lax.dot_general(ordered.reshape(-1, lanes), ones, over_lanes, precision="highest")
    return jnp.sum(blocks.reshape(-1, num_blocks, tile), axis=1).reshape(num_outputs)
