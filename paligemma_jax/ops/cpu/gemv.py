"""GEMV kernels: at most `MOST_ROWS` rows times a large weight, or keys and values, each as one variadic reduce.

What they compute: x @ w.T. Why XLA needs it so: its own kernels want many rows, convert 16-bit weights first, and know
neither 4-bit numbers nor integers with a zero point. Sums of several arrays in one `lax.reduce` are left to LLVM
instead, which reads the weight once, in the order of its memory, and converts it in registers. XLA splits a reduction
of a single array, and floats whose order of additions matters are added one after the other: `compilation` says that
it does not.

Gain, on a Zen 4 (benchmarks/results/products.md): one row times a weight [16384, 2048] takes 1.9 ms in bfloat16, 1.1
in int8 and 0.64 in int4; XLA's kernels, which want four rows, take 4.3, 2.9 and 3.2. A token of PaliGemma 2 3B at
batch 1 takes two thirds of its time without in bfloat16, half in int4. Seen with jax 0.10 to 0.12. Delete a kernel
when `python -m paligemma_jax.ops` no longer chooses it, XLA's dot of one row being as fast as memory.

Axes: M rows, F outputs, D inputs, G groups of inputs.
"""

import jax
import jax.numpy as jnp
from jax import lax

MOST_ROWS = 4  # with more, XLA's own kernels are faster
_PARTS = 4  # of the weight that are gone over side by side; each reads a row of x once for all
_FEWEST_PARTS = 2
_ZERO_POINT = 8  # of numbers in 4 bits
_VECTOR = 32  # inputs of which groups are multiples, or their sums would cost more than their products


def fits(num_outputs: int) -> bool:
    """Whether a weight of so many outputs can be cut into parts."""
    return num_outputs % _PARTS == 0


def fits_groups(group: int) -> bool:
    """Whether groups of so many inputs, of a weight in 4 bits, are worth a loop of their own."""
    return group % _VECTOR == 0


def float_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [M, D] times a weight [F, D] of floats: float32 [M, F]."""
    return _matmul(x, weight, jnp.float32)


def int8_matmul(x: jax.Array, values: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times integers, i8 or u8 with a zero point of 128 [F, D]: i32 [M, F].

    Bytes of which one is unsigned are what VNNI multiplies; other bytes LLVM multiplies in pairs of 16 bits.
    """
    unsigned = values.dtype == jnp.uint8
    y = _matmul(_computed_once(x, jnp.int8 if unsigned else jnp.int16), values, jnp.int32)
    return y - 128 * jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32) if unsigned else y


def int4_matmul(x: jax.Array, values: jax.Array, group_scale: jax.Array) -> jax.Array:
    """Rows i8 [M, D] times the integers of an `Int4`, values u8 [F, D / 2] and group scales i8 [F, G]: i32 [M, F]."""
    num_rows, num_outputs, num_groups = len(x), *group_scale.shape
    # In 16 bits: taking bytes apart in bytes gains nothing. What depends on x alone stays out of the barrier, so that
    # it is computed once for all weights of these rows.
    x = _computed_once(x, jnp.int16)
    parts = x.astype(jnp.int32).reshape(num_rows * 2, num_groups // 2, -1, _VECTOR)  # XLA splits sums of longer axes
    corrections = _ZERO_POINT * jnp.sum(parts, axis=(2, 3), dtype=jnp.int32)
    x, corrections, values, group_scale = lax.optimization_barrier((x, corrections, values, group_scale))
    grouped = values.astype(jnp.uint16).reshape(num_outputs, num_groups // 2, -1)
    halves = [half.astype(jnp.int32) for half in (grouped & 15, grouped >> 4)]
    x = x.astype(jnp.int32).reshape(num_rows, 2, num_groups // 2, -1)
    sums = _sums([half * of_half[None] for row in x for half, of_half in zip(halves, row, strict=True)])
    scales = [half for _ in range(num_rows) for half in jnp.split(group_scale.astype(jnp.int32), 2, axis=1)]
    scaled = [(y - correction[None]) * scale for y, correction, scale in zip(sums, corrections, scales, strict=True)]
    low_and_high = jnp.stack(_sums(scaled)).reshape(num_rows, 2, num_outputs)
    return low_and_high[:, 0] + low_and_high[:, 1]


def per_head_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows [..., M, D], M from 2 to `MOST_ROWS`, times keys or values y [..., F, D] of a head: float32 [..., M, F].

    XLA's kernels lay keys and values out anew first. With transposes by tiles (`matmul`), a step of 16 answers of
    PaliGemma 2 3B takes 214 ms instead of 248 in int8, 365 instead of 405 in bfloat16 (a Zen 4, jax 0.12).
    """
    x, y = (part.astype(jnp.float32) for part in lax.optimization_barrier((x, y)))  # as in `_matmul`
    return jnp.stack(_sums([y * x[..., i, None, :] for i in range(x.shape[-2])]), axis=-2)


def _matmul(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # Together, or a loop around would widen the weight ahead; each row by itself, or all would be widened before.
    rows, weight = lax.optimization_barrier((list(x), weight))
    parts = jnp.split(weight.astype(dtype), max(_FEWEST_PARTS, _PARTS // len(rows)))
    outputs = _sums([part * row.astype(dtype)[None] for row in rows for part in parts])
    return jnp.concatenate(outputs).reshape(len(rows), -1)


def _computed_once(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows i8 as i8 or i16, but no part of the loop: before jax 0.11 they would be rounded again for each output, were
    they no reduction (PaliGemma 2 3B in int4: 734 ms a token, 163 so). Delete with jax 0.10."""
    if jax.__version_info__ >= (0, 11):
        return x.astype(dtype)
    turn = lax.broadcasted_iota(jnp.int8, (2, *x.shape), 0)
    return jnp.max(jnp.where(turn == 0, x.astype(dtype)[None], jnp.iinfo(jnp.int8).min), axis=0)


def _sums(terms: list[jax.Array]) -> list[jax.Array]:
    """The sum of each of several arrays over its last axis, in one loop."""
    zeros = [jnp.zeros((), term.dtype) for term in terms]
    return lax.reduce(terms, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), (terms[0].ndim - 1,))
