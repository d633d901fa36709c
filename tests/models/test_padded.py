"""Zeros after each row change where numbers lie, and no product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import cpu, padded
from paligemma_jax.models.layers import linear
from paligemma_jax.models.padded import Padded
from paligemma_jax.models.quantized import rows_of


def laid_out(weight: jax.Array, more: int) -> Padded:
    return Padded(jnp.pad(weight, ((0, 0), (0, more))), weight.shape[1])


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 70])
def test_the_product_and_the_rows_are_those_of_the_weight(dtype, tolerance, num_rows):
    x, weight = (jax.random.normal(jax.random.key(i), (rows, 24), dtype) for i, rows in enumerate((num_rows, 40)))
    weight = laid_out(weight, 8)
    plain = np.asarray(weight.values[:, :24])
    assert (weight.shape, weight.size, weight.dtype) == (plain.shape, plain.size, plain.dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(plain, np.float64).T
    np.testing.assert_allclose(jax.jit(linear)(x[None], weight)[0], expected, atol=tolerance * 10)
    index = jnp.array([[0, 39], [7, 7]])
    np.testing.assert_array_equal(rows_of(weight, index), plain[np.asarray(index)])


@pytest.mark.parametrize(
    "shape, dtype, num_rows, more",
    [
        ((2048, 2048), "bfloat16", 5, 32),
        ((2048, 2048), "float16", 16, 32),
        ((1024, 14336), "bfloat16", 16, 32),  # seven pages
        ((2048, 2048), "bfloat16", 4, 0),  # sums, which read one row after the other
        ((2048, 2048), "bfloat16", 17, 0),  # another kernel
        ((2048, 2304), "bfloat16", 16, 0),  # rows that lie apart as they are
        ((64, 2048), "bfloat16", 16, 0),  # small
        ((2048, 2048), "float32", 16, 0),
        ((2048, 2048), "uint8", 16, 0),
    ],
)
def test_rows_of_whole_pages_are_laid_apart_where_that_is_clearly_faster(monkeypatch, shape, dtype, num_rows, more):
    weight = jax.ShapeDtypeStruct(shape, dtype)
    for gain, expected in ((2.0, more), (1.05, 0)):
        monkeypatch.setattr(cpu, "seconds", lambda x, rows, gain=gain: gain if x.shape[1] == shape[1] else 1.0)
        assert padded.padding(weight, num_rows) == expected
    monkeypatch.setattr(cpu, "seconds", lambda x, rows: 2.0 if x.shape[1] == shape[1] else 1.0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert padded.padding(weight, num_rows) == 0


def test_what_is_compared_can_be_measured(monkeypatch):
    monkeypatch.setattr(cpu, "_MEASURED", 2**16)
    cpu._times.cache_clear()
    assert padded.padding(jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16), 16) in (0, 32)
    assert cpu._times.cache_info().currsize == 2
    cpu._times.cache_clear()
