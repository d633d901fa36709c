"""Products of few rows with a large weight, or with keys and values, and reductions of few numbers, spelt so that XLA
on CPU compiles each into one loop.

XLA's own kernels want many rows, and whole bytes for numbers. Sums of several arrays in one reduction are left to LLVM
instead, which reads the weight once, in the order of its memory, and takes it apart in registers: all that a step of
decoding should cost. A reduction of one array would not do: XLA splits it. Nor would one of floats whose order of
additions matters: `compiling` says that it does not.

Axes: M rows, F outputs, D inputs, G groups of inputs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

MOST = 4  # rows; more are slower than XLA's kernels, which are made for them, but for 8 bits
MOST_WHOLE = 16  # rows of 8 bits, which dot-product instructions take `MOST` at a time
_PARTS = 4  # of the weight that are gone over side by side; each reads a row once for all
_FEWEST_PARTS = 2
_MOST_PARTS = 6  # for more than `MOST` rows: as many sums as there are registers for
_OFFSET = 8  # of numbers in 4 bits
_VECTOR = 32  # inputs that groups are whole multiples of, or their sums would cost more than their products


def fits(num_outputs: int) -> bool:
    """Whether a weight of so many outputs can be cut into parts."""
    return num_outputs % _PARTS == 0


def fits_groups(group: int) -> bool:
    """Whether groups of so many inputs, of a weight in 4 bits, are worth a loop of their own."""
    return group % _VECTOR == 0


@jax.custom_vjp
def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [M, D] times a weight [F, D], M at most `MOST` and F as in `fits`: float32 [M, F]."""
    return _product(rows, weight, jnp.float32)


def _product_and_operands(rows: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(rows, weight), (rows, weight)


def _gradients(operands: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """JAX would derive a reduction of several arrays by halving them again and again."""
    rows, weight = operands
    to_rows = jnp.matmul(cotangent, weight, preferred_element_type=jnp.float32)
    to_weight = jnp.matmul(cotangent.mT, rows, preferred_element_type=jnp.float32)
    return to_rows.astype(rows.dtype), to_weight.astype(weight.dtype)


product.defvjp(_product_and_operands, _gradients)


@jax.custom_vjp
def product_per_head(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Rows [..., M, D], M from 2 to `MOST`, times x [..., F, D]: float32 [..., M, F]."""
    rows, x = (part.astype(jnp.float32) for part in lax.optimization_barrier((rows, x)))  # as in `_product`
    return jnp.stack(_sums([x * rows[..., i, None, :] for i in range(rows.shape[-2])]), axis=-2)


product_per_head.defvjp(lambda rows, x: (product_per_head(rows, x), (rows, x)), _gradients)


def whole_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The same of rows i8, M at most `MOST_WHOLE`, and a weight of whole numbers, i8 or u8: i32 [M, F].

    Bytes of which one is unsigned are what VNNI multiplies; other bytes LLVM multiplies in pairs of 16 bits.
    """
    rows = _worked_out(rows, jnp.int8 if weight.dtype == jnp.uint8 else jnp.int16)
    return _product(rows, weight, jnp.int32) if len(rows) <= MOST else _product_by_turns(rows, weight)


@jax.custom_jvp
def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis [..., D], which is kept: [..., 1]."""
    return _reduced(x, jnp.add, 0)


@total.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return total(*primals), jnp.sum(*tangents, axis=-1, keepdims=True)


def largest(x: jax.Array) -> jax.Array:
    """The largest over the last axis of floats [..., D], which is kept: [..., 1]. It is not to be differentiated."""
    return _reduced(x, jnp.maximum, -jnp.inf)


def packed_product(rows: jax.Array, values: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times the whole numbers of a weight in 4 bits: i32 [M, F].

    `values` u8 [F, D / 2] and `multiplier` i8 [F, G] are as in `quantized.Quantized`.
    """
    num_rows, num_outputs, num_groups = len(rows), *multiplier.shape
    # In 16 bits: taking bytes apart in bytes gains nothing. What depends on the rows alone stays out of the barrier, so
    # that it is worked out once for all weights of these rows.
    rows = _worked_out(rows, jnp.int16)
    parts = rows.astype(jnp.int32).reshape(num_rows * 2, num_groups // 2, -1, _VECTOR)  # XLA splits sums of longer axes
    offsets = _OFFSET * jnp.sum(parts, axis=(2, 3), dtype=jnp.int32)
    rows, offsets, values, multiplier = lax.optimization_barrier((rows, offsets, values, multiplier))
    grouped = values.astype(jnp.uint16).reshape(num_outputs, num_groups // 2, -1)
    halves = [half.astype(jnp.int32) for half in (grouped & 15, grouped >> 4)]
    rows = rows.astype(jnp.int32).reshape(num_rows, 2, num_groups // 2, -1)
    sums = _sums([half * of_half[None] for row in rows for half, of_half in zip(halves, row, strict=True)])
    multipliers = [half for _ in range(num_rows) for half in jnp.split(multiplier.astype(jnp.int32), 2, axis=1)]
    weighted = [
        (group_sums - offset[None]) * factor
        for group_sums, offset, factor in zip(sums, offsets, multipliers, strict=True)
    ]
    low_and_high = jnp.stack(_sums(weighted)).reshape(num_rows, 2, num_outputs)
    return low_and_high[:, 0] + low_and_high[:, 1]


def _product(rows: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Together, or a loop around would widen the weight ahead; each row by itself, or all would be widened before.
    rows, weight = lax.optimization_barrier((list(rows), weight))
    parts = jnp.split(weight.astype(dtype), max(_FEWEST_PARTS, _PARTS // len(rows)))
    outputs = _sums([part * row.astype(dtype)[None] for row in rows for part in parts])
    return jnp.concatenate(outputs).reshape(len(rows), -1)


def _product_by_turns(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """`whole_product` of more than `MOST` rows: groups of so many take turns with each row of the parts of the weight,
    which stay in a cache meanwhile."""
    num_rows, num_outputs = len(rows), len(weight)
    groups = jnp.pad(rows, [(0, -num_rows % MOST), (0, 0)]).reshape(-1, MOST, rows.shape[1])
    nths, weight = lax.optimization_barrier(([groups[:, i] for i in range(MOST)], weight))  # see `_product`
    size = -(-num_outputs // _MOST_PARTS)
    starts = [min(i * size, num_outputs - size) for i in range(_MOST_PARTS)]  # the last parts may overlap others
    parts = [lax.slice_in_dim(weight.astype(jnp.int32), start, start + size) for start in starts]
    outputs = _sums([part[:, None] * nth.astype(jnp.int32)[None] for nth in nths for part in parts])
    by_row = jnp.stack(outputs).reshape(MOST, _MOST_PARTS * size, -1).transpose(2, 0, 1)
    by_row = by_row.reshape(-1, _MOST_PARTS * size)[:num_rows]
    return jnp.concatenate([by_row[:, : starts[-1]], by_row[:, -size:]], axis=1)


def _worked_out(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows i8 as i8 or i16, but no part of the loop: jax 0.10 would round them for each output, were they no
    reduction."""
    if jax.__version_info__ >= (0, 11):
        return rows.astype(dtype)
    turn = lax.broadcasted_iota(jnp.int8, (2, *rows.shape), 0)
    return jnp.max(jnp.where(turn == 0, rows.astype(dtype)[None], jnp.iinfo(jnp.int8).min), axis=0)


def _reduced(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array], start: float) -> jax.Array:
    """A reduction over the last axis, which is kept, of its halves side by side: of one array XLA makes several."""
    parts = jnp.split(x, 2, axis=-1) if x.shape[-1] % 2 == 0 else [x]
    starts = [jnp.asarray(start, x.dtype)] * len(parts)
    parts = lax.reduce(parts, starts, lambda x, y: jax.tree.map(combine, x, y), (x.ndim - 1,))
    return functools.reduce(combine, parts)[..., None]


def _sums(terms: list[jax.Array]) -> list[jax.Array]:
    """The sum of each of several arrays over its last axis, in one loop."""
    zeros = [jnp.zeros((), term.dtype) for term in terms]
    return lax.reduce(terms, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), (terms[0].ndim - 1,))
