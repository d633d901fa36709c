"""How a product is spelt is a matter of speed only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import measured
from paligemma_jax.compiling import compiled
from paligemma_jax.models import cpu, few_rows, quantized
from paligemma_jax.models.layers import linear, measure


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 64, 65])
@pytest.mark.parametrize("first", [True, False])
def test_both_orders_give_the_product(monkeypatch, dtype, tolerance, rows, first):
    monkeypatch.setattr(cpu, "weight_first", lambda weight, rows: first)
    x, weight = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(rows, 24), (40, 24)]))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(linear(x, weight), expected, atol=tolerance * 10)


def test_gradients_pass_through_both_orders(monkeypatch):
    x, weight = jnp.ones((3, 8)), jax.random.normal(jax.random.key(0), (6, 8))
    for first in (True, False):
        monkeypatch.setattr(cpu, "weight_first", lambda weight, rows, first=first: first)
        found = jax.grad(lambda x: jnp.square(linear(x, weight)).sum())(x)
        np.testing.assert_allclose(found, 2 * x @ weight.T @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "num_rows", [1, *(pytest.param(rows, marks=pytest.mark.slow) for rows in range(2, few_rows.MOST)), few_rows.MOST]
)
@pytest.mark.parametrize(
    "shape",
    [(40, 128), (24, 383), *(pytest.param(s, marks=pytest.mark.slow) for s in [(16, 2304), (8, 2368), (64, 4096)])],
)
def test_few_rows_as_sums_give_the_product(dtype, num_rows, shape):
    sizes = (num_rows, shape[1]), shape
    x, weight = (jax.random.normal(jax.random.key(i), size, dtype) for i, size in enumerate(sizes))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert few_rows.fits(shape[0])
    for function in (
        jax.jit(few_rows.product),
        few_rows.product,
        lambda *args: compiled(jax.jit(few_rows.product), *args)(*args),
    ):
        np.testing.assert_allclose(function(x, weight), expected, atol=1e-5 * shape[1])


@pytest.mark.parametrize("num_outputs", [8, 28])
@pytest.mark.parametrize("num_rows", [*range(1, few_rows.MOST + 2), 13, few_rows.MOST_WHOLE])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_sums_of_whole_numbers_are_exact_at_the_ends_of_their_range(num_rows, dtype, num_outputs):
    rng, ends = np.random.default_rng(0), np.iinfo(dtype)
    rows = rng.choice([-128, -127, 0, 127], (num_rows, 16384))
    weight = rng.choice([ends.min, ends.max], (num_outputs, 16384))
    program = compiled(jax.jit(few_rows.whole_product), jnp.asarray(rows, jnp.int8), jnp.asarray(weight, dtype))
    np.testing.assert_array_equal(program(jnp.asarray(rows, jnp.int8), jnp.asarray(weight, dtype)), rows @ weight.T)
    rows[:], weight[:] = -128, ends.max
    np.testing.assert_array_equal(program(jnp.asarray(rows, jnp.int8), jnp.asarray(weight, dtype)), rows @ weight.T)


@pytest.mark.parametrize(
    "dtype, num_rows",
    [
        *((dtype, rows) for dtype in ("bfloat16", "int8", "uint8", "int4") for rows in range(1, few_rows.MOST + 1)),
        *(("uint8", rows) for rows in (few_rows.MOST + 1, few_rows.MOST_WHOLE)),
    ],
)
def test_sums_are_one_loop_over_the_weight(num_rows, dtype):
    """Or they would be far slower than a kernel: XLA splits a reduction of a single array, and widens one it may."""
    width = 2048
    if dtype == "bfloat16":
        function, shapes = few_rows.product, [((4096, width), dtype)]
    elif dtype in ("int8", "uint8"):
        function, shapes = few_rows.whole_product, [((4096, width), dtype)]
    else:
        function, shapes = few_rows.packed_product, [((4096, width // 2), "uint8"), ((4096, width // 128), "int8")]
    rows = jax.ShapeDtypeStruct((num_rows, width), "bfloat16" if dtype == "bfloat16" else "int8")
    program = compiled(jax.jit(function), rows, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert "reduce-window" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 4096 * width / 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("num_rows", range(2, few_rows.MOST + 1))
def test_sums_per_head_give_the_product_in_one_loop(dtype, num_rows):
    shapes = (3, 2, num_rows, 72), (3, 2, 304, 72)
    rows, x = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))
    expected = np.einsum("bkmd,bkfd->bkmf", *(np.asarray(part, np.float64) for part in (rows, x)))
    program = compiled(jax.jit(few_rows.product_per_head), rows, x)
    np.testing.assert_allclose(program(rows, x), expected, atol=1e-4)
    assert "reduce-window" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * x.nbytes


def test_sums_per_head_are_of_few_rows_and_many_half_precision_numbers(monkeypatch):
    def wins(num_rows: int, num_keys: int, dtype: str = "bfloat16") -> bool:
        return cpu.sums_win_per_head(*(jax.ShapeDtypeStruct((1, 4, n, 256), dtype) for n in (num_rows, num_keys)))

    assert [wins(count, 304) for count in (1, 2, 4, 5)] == [False, True, True, False]
    assert not wins(2, 16) and not wins(2, 304, "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not wins(2, 304)


@pytest.mark.parametrize("width", [1, 7, 16384])
def test_sums_of_whole_rows_are_exact(width):
    rows = np.random.default_rng(0).choice([-128, -127, 0, 127], (3, width))
    rows[0] = -128
    program = compiled(jax.jit(few_rows.total), jnp.asarray(rows, jnp.int32))
    np.testing.assert_array_equal(program(jnp.asarray(rows, jnp.int32)), rows.sum(axis=1, keepdims=True))
    if width % 2 == 0:
        assert "reduce-window" not in program.as_text()


@pytest.mark.parametrize("shape", [(2304,), (1, 2304), (2, 3, 7), (16, 4096)])
def test_reductions_are_those_of_numpy_however_large(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for reduce, expected in ((cpu.total, x.astype(np.float64).sum), (cpu.largest, x.max)):
        program = compiled(jax.jit(reduce), x)
        np.testing.assert_allclose(program(x), expected(axis=-1, keepdims=True), rtol=1e-6, atol=1e-4)
        if x.size <= cpu._SMALL and shape[-1] % 2 == 0:
            assert "reduce-window" not in program.as_text()
    gradient = jax.grad(lambda x: jnp.sum(cpu.total(jnp.square(x)) ** 2))(x)
    np.testing.assert_allclose(gradient, 4 * np.square(x).sum(-1, keepdims=True) * x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 304), (2, 3, 7), (16, 4096)])
def test_softmax_is_that_of_jax_however_large(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 5
    x[0] = -2.3819763e38  # a row that sees nothing
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def value(softmax, x):
        return jnp.sum(softmax(x) * weights)

    np.testing.assert_allclose(cpu.softmax(x), jax.nn.softmax(x, axis=-1), rtol=1e-5, atol=1e-7)
    gradients = (jax.grad(value, argnums=1)(softmax, x) for softmax in (cpu.softmax, jax.nn.softmax))
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_what_is_no_number_is_found_by_reductions():
    x = np.ones((2, 64), np.float32)
    x[0, 3], x[1, 40] = np.nan, -np.inf
    for reduce, plain in ((cpu.total, jnp.sum), (cpu.largest, jnp.max)):
        np.testing.assert_array_equal(compiled(jax.jit(reduce), x)(x), plain(x, axis=-1, keepdims=True))


@pytest.mark.parametrize("num_outputs, in_tiles", [(64, False), (4032, True), (4033, False)])
def test_large_products_are_turned_by_tiles(monkeypatch, num_outputs, in_tiles):
    monkeypatch.setattr(cpu, "_LARGE_PRODUCT", 2**12)
    y = np.random.default_rng(0).normal(size=(num_outputs, 16)).astype(np.float32)
    turn = jax.jit(cpu._turned, static_argnums=1)
    program = compiled(turn, y, 3)
    np.testing.assert_array_equal(program(y), y.T[:3])
    assert ("[63,3,64]" in program.as_text()) == in_tiles
    slope = jax.grad(lambda y: jnp.square(turn(y, 3)).sum())(y)
    np.testing.assert_array_equal(slope, 2 * y * (np.arange(16) < 3))


def test_few_rows_are_sums_where_these_are_fast(monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 0)
    rows, weight = jax.random.normal(jax.random.key(0), (5, 128), "bfloat16"), jnp.ones((24, 128), "bfloat16")
    expected = np.broadcast_to(np.asarray(rows, np.float64).sum(axis=1, keepdims=True), (5, 24))
    taken, product = [], few_rows.product
    monkeypatch.setattr(few_rows, "product", lambda rows, weight: taken.append(len(rows)) or product(rows, weight))
    for times, counts in (
        ([1.0, 1.0, 1.0, 0.5, 0.6], [1, 2, 4]),
        ([1.0, 1.0, 1.0, 0.5, 0.95], [1]),
        ([1.0, 1.0, 1.0, 0.95, 0.5], [2, 4]),
        ([0.4, 1.0, 1.0, 0.5, 0.5], []),
    ):
        monkeypatch.setattr(cpu, "_times", lambda dtype, width, times=times: times)
        for count in (1, 2, 4, 5):
            np.testing.assert_allclose(linear(rows[:count], weight), expected[:count], atol=1e-3)
        assert taken == counts
        taken.clear()
    monkeypatch.setattr(cpu, "_times", lambda dtype, width: [1.0, 1.0, 1.0, 0.5, 0.5])
    for shape, dtype, count, win in (
        ((24, 128), "bfloat16", 1, True),
        ((22, 128), "bfloat16", 1, False),
        ((24, 128), "float32", 1, False),
        ((24, 128), "bfloat16", 0, False),
    ):
        assert cpu.sums_win(jax.ShapeDtypeStruct(shape, dtype), count) == win


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_sums_of_8_bits_are_taken_by_their_own_times(monkeypatch, dtype):
    weight = jax.ShapeDtypeStruct((8192, 2048), dtype)
    for times, wins in (([1.0, 1.0, 0.5, 0.6], [1, 4]), ([1.0, 1.0, 0.95, 0.6], [4]), ([0.5, 1.0, 0.6, 0.95], [])):
        monkeypatch.setattr(cpu, "_whole_times", lambda dtype, width, times=times: times)
        assert [count for count in (1, 4) if cpu.sums_win(weight, count)] == wins
    monkeypatch.setattr(cpu, "_whole_times", lambda dtype, width: [1.0, 1.0, 0.5, 0.5])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not cpu.sums_win(weight, 1)


def test_more_rows_of_8_bits_are_sums_where_these_are_faster(monkeypatch):
    monkeypatch.setattr(cpu, "_whole_times", lambda dtype, width: [1.0] * 4)
    for times, dtype, counts in (([1.0, 0.95], "uint8", [5, 16]), ([1.0, 1.05], "uint8", []), ([1.0, 0.5], "int8", [])):
        monkeypatch.setattr(cpu, "_many_whole_times", lambda width, times=times: times)
        weight = jax.ShapeDtypeStruct((9216, 2304), dtype)
        assert [count for count in (4, 5, 16, 17) if cpu.sums_win(weight, count)] == counts


def test_seconds_are_of_the_fastest_way_and_grow_with_the_weight(monkeypatch):
    monkeypatch.setattr(cpu, "_times", lambda dtype, width: [4.0, 8.0, 6.0, 1.0, 3.0])
    rows = cpu.num_measured(2 * 2048)
    once, thrice = (jax.ShapeDtypeStruct((count * rows, 2048), "bfloat16") for count in (1, 3))
    assert [cpu.seconds(once, count) for count in (1, 8, 16)] == [1.0, 6.0, 6.0]
    assert [cpu.seconds(thrice, count) for count in (1, 8)] == [3.0, 18.0]


@pytest.mark.parametrize("product", [few_rows.product, few_rows.product_per_head])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_gradients_pass_through_the_sums(product, dtype, tolerance):
    x, weight = jnp.ones((2, 128), dtype), jax.random.normal(jax.random.key(0), (8, 128), dtype)

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.square(product(x, weight)).sum()

    to_x, to_weight = jax.grad(loss, argnums=(0, 1))(x, weight)
    assert to_x.dtype == to_weight.dtype == dtype
    x, weight = (np.asarray(operand, np.float64) for operand in (x, weight))
    y = 2 * x @ weight.T
    for found, expected in ((to_x, y @ weight), (to_weight, y.T @ x)):
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


def test_only_large_weights_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu, "_times", lambda dtype, width: asked.append((dtype.name, width)) or [1.0] * 5)
    monkeypatch.setattr(cpu, "_whole_times", lambda dtype, width: asked.append((dtype.name, width)) or [1.0] * 4)
    monkeypatch.setattr(cpu, "_many_whole_times", lambda width: asked.append(width) or [1.0] * 2)
    monkeypatch.setattr(quantized, "_packed_times", lambda width, groups: asked.append((width, groups)) or [1.0] * 4)
    monkeypatch.setattr(quantized, "values_dtype", lambda: np.dtype("int8"))
    small, large = (jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16) for rows in (4, 8192))
    assert not cpu.weight_first(small, 1) and not cpu.weight_first(large, 1)
    measure({"norm": jax.ShapeDtypeStruct((2**24,), jnp.bfloat16), "small": small, "large": large})
    measure([quantized.abstract(large, bits) for bits in (8, 4)])
    assert asked == [("bfloat16", 2048)] * 3 + [("int8", 2048), (2048, 16)]
    asked.clear()
    values = jax.ShapeDtypeStruct(large.shape, "uint8")
    for count in (1, 16):
        measure(dataclasses.replace(quantized.abstract(large, 8), values=values), count)
    assert asked == [("uint8", 2048)] * 2 + [2048]


@pytest.mark.parametrize(
    "times, chosen",
    [
        ([1.05, 1.05, 1.0], [False, False, False]),
        ([1.05, 1.5, 1.0], [False, True, False]),
        ([1.5, 2.5, 1.0], [True, True, False]),
        ([6.0, 6.0, 1.0], [True, True, True]),
    ],
)
def test_the_order_follows_a_clear_gain_and_with_many_rows_a_cliff(monkeypatch, times, chosen):
    monkeypatch.setattr(cpu, "_times", lambda dtype, width: times)
    weight, smaller = (jax.ShapeDtypeStruct((rows, 16384), jnp.bfloat16) for rows in (2048, 128))
    assert [cpu.weight_first(weight, rows) for rows in (1, 16, 272)] == chosen
    assert cpu.weight_first(smaller, 64) == chosen[1] and not cpu.weight_first(smaller, 65)


@pytest.mark.parametrize("dtype, rows, filled", [("bfloat16", 1, 16), ("float16", 17, 32), ("bfloat16", 65, 65)])
def test_few_rows_in_half_precision_are_filled_up(dtype, rows, filled):
    arrays = (jax.ShapeDtypeStruct((count, 24), dtype) for count in (rows, 40))
    text = jax.jit(cpu._weight_first).lower(*arrays).as_text()
    assert f"tensor<40x{filled}xf32>" in text


def test_measuring_works_while_a_network_is_traced(monkeypatch):
    monkeypatch.setattr(cpu, "_MEASURED", 2 * 64 * 128)
    monkeypatch.setattr(cpu, "LARGE", 0)
    cpu._times.cache_clear()
    x, weight = jnp.ones((2, 128), "bfloat16"), jnp.ones((8, 128), "bfloat16")
    np.testing.assert_array_equal(jax.jit(linear)(x, weight), np.full((2, 8), 128.0))
    assert cpu._times.cache_info().currsize == 1
    cpu._times.cache_clear()


@pytest.mark.parametrize(
    "seconds, fast", [([1.0, 0.6], True), ([1.0, 1.3], True), ([1.0, 3.0], True), ([1.0, 20.0], False)]
)
def test_unsigned_products_are_left_where_there_is_no_kernel_for_them(monkeypatch, seconds, fast):
    monkeypatch.setattr(measured, "remembered", lambda name, count, calls: seconds)
    assert cpu.unsigned_is_fast.__wrapped__() == fast
