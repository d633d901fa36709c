"""Quantized weights against float64, by every kernel, and what a program for each looks like elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.ops.cpu.layout import CpuWeight

WIDTHS = {"groups of 128": 256, "groups of 8": 48}


@pytest.fixture(scope="module", params=WIDTHS.values(), ids=WIDTHS)
def weight(request):
    """Rows of very different size, one of them empty."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, request.param)) * np.geomspace(1e-3, 1e3, 40)[:, None]
    rows[7] = 0
    return jnp.asarray(rows, jnp.float32)


def exact(weight, name):
    """The weight that a quantized one stands for, computed in numpy, and the step between two of its numbers."""
    found = jax.tree.map(np.asarray, ops.quantize(weight, name))
    if name == "int8":
        return found.values.astype(np.float64) * found.scale[:, None], found.scale[:, None]
    numbers = np.concatenate([found.values & 15, found.values >> 4], axis=1).astype(np.int64) - 8
    groups = found.group_scale.shape[1]
    step = found.scale[:, None] * np.repeat(found.group_scale, weight.shape[1] // groups, axis=1).astype(np.float64)
    assert np.abs(numbers).max() == 7 and found.group_scale.min() >= 1 and found.group_scale.max() == 18
    return numbers * step, step


@pytest.mark.parametrize("name", ops.FORMATS)
def test_rounding_is_to_the_nearest(weight, name):
    found, step = exact(weight, name)
    assert found.shape == weight.shape
    # Where a group's largest number lies just above a group scale's reach, it is clipped by a thousandth of it.
    assert (np.abs(found - np.asarray(weight, np.float64)) <= step * (0.51 if name == "int4" else 0.5001)).all()
    assert not found[7].any()
    np.testing.assert_allclose(ops.quantize(weight, name).dequantize(), found, rtol=1e-6)


@pytest.mark.parametrize("name", ops.FORMATS)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 40])
def test_matmul_is_that_of_rounded_activations(weight, name, num_rows):
    x = np.random.default_rng(num_rows).normal(size=(num_rows, weight.shape[1])).astype(np.float32)
    x[-1] *= 50
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    expected = (np.round(x / scale) * scale.astype(np.float64)) @ exact(weight, name)[0].T
    found = jax.jit(ops.linear)(jnp.asarray(x), ops.quantize(weight, name))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max(axis=0).max())


def variants(weight):
    """A quantized weight with each kernel, and whether that is for few rows only."""
    if weight.quantization == "int4":
        names = {"gemv": True, "tiles": False, "tiles_unsigned": False}
        return [(dataclasses.replace(weight, kernels=((None, name),)), few) for name, few in names.items()]
    unsigned = dataclasses.replace(weight, values=ops.with_zero_point(weight.values, jnp.uint8))
    kinds = [(form, name) for form in (weight, unsigned) for name in ("reference", "gemv", "dot")]
    return [(dataclasses.replace(form, kernels=((None, name),)), name == "gemv") for form, name in kinds]


@pytest.mark.parametrize("name", ops.FORMATS)
@pytest.mark.parametrize(
    "width", [128, 2304, *(pytest.param(width, marks=pytest.mark.slow) for width in (768, 2048, 4608))]
)
def test_every_kernel_gives_the_same_numbers(name, width):
    weight = ops.quantize(jax.random.normal(jax.random.key(0), (48, width)), name)
    for num_rows in (1, 3, 4, 16):
        x = jax.random.normal(jax.random.key(num_rows), (num_rows, width))
        weights = [weight, *(form for form, few in variants(weight) if num_rows <= 4 or not few)]
        reference, *found = jax.jit(lambda x, weights: [ops.linear(x, form) for form in weights])(x, weights)
        for y in found:
            np.testing.assert_array_equal(y, reference)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_activations_stay_as_they_are_where_they_are_not_quantized(weight, dtype, tolerance):
    few = ops.quantize(weight.astype(dtype), "int8", quantize_activations=False)
    x = jax.random.normal(jax.random.key(0), (3, weight.shape[1])) * jnp.array([[1.0], [1e3], [1e-3]])
    x = x.at[:, 0].mul(1e4).astype(dtype)  # next to such a number, 8 bits would leave nothing of the others
    plain = exact(weight.astype(dtype), "int8")[0]
    expected, size = np.asarray(x, np.float64) @ plain.T, np.abs(np.asarray(x, np.float64)) @ np.abs(plain).T
    assert (np.abs(ops.linear(x, few) - expected) <= tolerance * size).all()


@pytest.mark.parametrize("name, activations", [("int8", True), ("int8", False), ("int4", True)])
def test_a_low_rank_update_gets_the_gradient_of_the_plain_weight(name, activations):
    """LoRA (arXiv 2106.09685) in front of a quantized layer: straight through the rounding of activations."""
    keys = jax.random.split(jax.random.key(0), 5)
    weight = ops.quantize(jax.random.normal(keys[0], (64, 256)), name, activations)
    x, down, up = (
        jax.random.normal(key, shape) for key, shape in zip(keys[1:], [(6, 256), (256, 4), (4, 256)], strict=False)
    )
    direction = jax.random.normal(keys[4], (6, 64))

    def loss(adapter, weight):
        down, up = adapter
        return jnp.sum(ops.linear(x + x @ down @ up, weight) * direction)

    found, expected = (jax.jit(jax.grad(loss))((down, up), form) for form in (weight, weight.dequantize()))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())
    gradient = jax.grad(loss, argnums=1, allow_int=True)((down, up), weight)
    assert gradient.values.dtype == jax.dtypes.float0 and np.isfinite(gradient.scale).all() and gradient.scale.any()


def test_values_of_the_right_form_are_left_where_they_are():
    for values in (jnp.zeros((2, 4), jnp.int8), jnp.zeros((2, 4), jnp.uint8)):
        assert ops.with_zero_point(values, values.dtype) is values


@pytest.mark.parametrize("name", ops.FORMATS)
def test_rows_are_those_of_the_weight(weight, name):
    index = jnp.array([[3, 0], [39, 7]])
    for form in [ops.quantize(weight, name), *(form for form, _ in variants(ops.quantize(weight, name)))]:
        found = ops.take_rows(form, index)
        assert found.shape == (2, 2, weight.shape[1]) and found.dtype == weight.dtype
        np.testing.assert_allclose(found, exact(weight, name)[0][np.asarray(index)], rtol=1e-6)


def test_a_quantized_weight_looks_like_the_weight():
    weight = jnp.ones((6, 32), jnp.bfloat16)
    for name, nbytes in (("int8", 6 * 32), ("int4", 6 * 16)):
        found = ops.quantize(weight, name)
        assert (found.shape, found.size, found.ndim, found.dtype) == ((6, 32), 192, 2, jnp.bfloat16)
        assert found.values.nbytes == nbytes
        shape = ops.quantized_shape(jax.ShapeDtypeStruct((6, 32), jnp.bfloat16), name)
        assert jax.tree.structure(shape) == jax.tree.structure(found)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shape) == jax.tree.map(lambda x: (x.shape, x.dtype), found)
    assert repr(ops.quantize(weight, "int8", False)) == "Int8([6, 32], bfloat16, activations as they are, reference)"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_of_every_weight_type_are_lowered_for_a_platform_that_is_not_there(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("the backend was asked for"))
    plain = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    forms = [plain, CpuWeight(plain, 256, ((None, "x_first"),)), ops.quantized_shape(plain, "int8", False)]
    forms += [ops.quantized_shape(plain, name) for name in ops.FORMATS]

    def run(x, weights, index):
        return [(ops.linear(x, weight), ops.take_rows(weight, index)) for weight in weights]

    shapes = jax.ShapeDtypeStruct((2, 256), jnp.bfloat16), forms, jax.ShapeDtypeStruct((3,), jnp.int32)
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("dot_general") >= len(forms)
