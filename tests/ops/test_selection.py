"""Which kernel and layout a weight gets, from a table alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import ops
from paligemma_jax.ops import autotune
from paligemma_jax.ops.autotune import Spec, Table, spec_of
from paligemma_jax.ops.cpu.layout import CpuWeight
from paligemma_jax.ops.kernels import kernel_for

CPU, GPU = ops.Target("cpu"), ops.Target("cuda")
UNSIGNED = {"zero point of 8-bit weights": {"int8": 1.0, "uint8": 1.0}}


def struct(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def times(spec, *seconds):
    return {str(spec): dict(zip((f"{k}/{n}" for k, n in spec.candidates()), seconds, strict=True))}


def kernels(weight, entries, target=CPU, path="language_model/x_proj/weight"):
    found = ops.prepare_leaf(path, weight, target, Table(entries))
    assert hasattr(found, "kernels") or isinstance(found, jax.ShapeDtypeStruct)
    return getattr(found, "kernels", ())


@pytest.mark.parametrize(
    "seconds, one, four",
    [
        ((1.0, 1.0, 1.0, 0.5, 0.6), "gemv", "gemv"),
        ((1.0, 1.0, 1.0, 0.5, 0.95), "gemv", "x_first"),
        ((1.0, 1.0, 1.0, 0.95, 0.5), "x_first", "gemv"),
        ((0.4, 1.0, 1.0, 0.5, 0.5), "x_first", "x_first"),
    ],
)
def test_few_rows_of_floats_are_a_gemv_where_that_is_clearly_faster(seconds, one, four):
    weight = struct((4096, 2048))
    found = kernels(weight, times(spec_of(weight, False), *seconds))
    assert [kernel_for(found, rows) for rows in (1, 2, 4, 5)] == [one, four, four, "x_first"]
    small, smaller = (kernels(struct((rows, 2048)), times(spec_of(weight, False), *seconds)) for rows in (256, 64))
    assert small == found and smaller == ((None, "x_first"),)  # as the keys of a layer
    odd = struct((4098, 2048))  # no multiple of what a GEMV goes over side by side
    assert "gemv" not in dict(kernels(odd, times(spec_of(odd, False), *seconds))).values()
    assert "gemv" not in dict(kernels(struct((4096, 2048), "float32"), {})).values()


@pytest.mark.parametrize(
    "seconds, chosen",
    [
        ((1.05, 1.05, 1.0), "xxx"),
        ((1.05, 1.5, 1.0), "xwx"),
        ((1.5, 2.5, 1.0), "wwx"),
        ((6.0, 6.0, 1.0), "www"),
    ],
)
def test_the_order_follows_a_clear_gain_and_with_many_rows_a_cliff(seconds, chosen):
    weight, smaller = struct((2048, 16384)), struct((128, 16384))
    entries = times(spec_of(weight, False), *seconds, 9.0, 9.0)
    names = [kernel_for(kernels(weight, entries), rows) for rows in (1, 16, 272)]
    assert "".join(name[0] for name in names) == chosen
    assert kernel_for(kernels(smaller, entries), 64)[0] == chosen[1]
    assert kernel_for(kernels(smaller, entries), 65) == "x_first"


@pytest.mark.parametrize("name", ops.FORMATS)
@pytest.mark.parametrize("unsigned", [True, False])
def test_integers_are_a_gemv_by_their_own_times(name, unsigned):
    weight = ops.quantized_shape(struct((8192, 2048)), name)
    spec = spec_of(weight, unsigned)
    dot = "dot" if name == "int8" else "tiles_unsigned" if unsigned else "tiles"
    for seconds, gemv in (((1.0, 1.0, 0.5, 0.6), [1, 4]), ((1.0, 1.0, 0.95, 0.6), [4]), ((0.5, 1.0, 0.6, 0.95), [])):
        table = Table(times(spec, *seconds) | (UNSIGNED if unsigned else {}))
        found = ops.prepare_leaf("language_model/x_proj/weight", weight, CPU, table)
        chosen = {rows: kernel_for(found.kernels, rows) for rows in (1, 4, 5)}
        assert [rows for rows, kernel in chosen.items() if kernel == "gemv"] == gemv and chosen[5] == dot
        if name == "int8":
            assert found.values.dtype == (jnp.uint8 if unsigned else jnp.int8)
    off_cpu = ops.prepare_leaf("language_model/x_proj/weight", weight, GPU, Table())
    assert off_cpu.kernels == ()


@pytest.mark.parametrize(
    "shape, dtype, num_rows, more",
    [
        ((2048, 2048), "bfloat16", 5, 32),
        ((2048, 2048), "float16", 16, 32),
        ((1024, 14336), "bfloat16", 16, 32),  # seven pages
        ((2048, 2048), "bfloat16", 4, 0),  # a GEMV reads one row after the other
        ((2048, 2048), "bfloat16", 17, 0),  # another kernel
        ((2048, 2304), "bfloat16", 16, 0),  # rows that lie apart as they are
        ((64, 2048), "bfloat16", 16, 0),  # small
        ((2048, 2048), "float32", 16, 0),
    ],
)
def test_rows_of_whole_pages_are_padded_where_that_is_clearly_faster(shape, dtype, num_rows, more):
    weight = struct(shape, dtype)
    for gain, expected in ((2.0, more), (1.05, 0)):
        plain = times(Spec(dtype, shape[1]), *[gain] * (3 if dtype == "float32" else 5))
        entries = plain | times(Spec(dtype, shape[1] + 32), *[1.0] * (3 if dtype == "float32" else 5))
        target = dataclasses.replace(CPU, num_rows=num_rows)
        found = ops.prepare_leaf("language_model/x_proj/weight", weight, target, Table(entries))
        assert getattr(found, "padding", 0) == expected and found.shape == shape
        found = ops.prepare_leaf(
            "language_model/x_proj/weight", weight, dataclasses.replace(target, platform="tpu"), Table()
        )
        assert found is weight


@pytest.mark.parametrize("target", [CPU, dataclasses.replace(CPU, num_rows=16), GPU])
@pytest.mark.parametrize("form", [None, *ops.FORMATS])
def test_shapes_get_the_structure_that_arrays_get_and_come_back(random_params, gemma2, monkeypatch, form, target):
    monkeypatch.setattr(autotune, "LARGE", 2**10)
    for name in ("LARGE", "_GEMV_SIZE"):
        monkeypatch.setattr(f"paligemma_jax.ops.selection.{name}", 2**10)
    monkeypatch.setattr("paligemma_jax.ops.cpu.layout.PAGE_BYTES", 16)
    plain = random_params(gemma2, "bfloat16")

    def converted(params, quantize):
        if form is None:
            return params
        decoder = jax.tree.map(lambda x: quantize(x, form) if x.ndim == 2 else x, params["language_model"])
        return params | {"language_model": decoder}

    shapes = converted(jax.eval_shape(lambda: plain), ops.quantized_shape)
    params = converted(plain, ops.quantize)
    entries = dict(UNSIGNED)
    for width in (32, 48, 24):
        for spec in (Spec("bfloat16", width), Spec("uint8", width), Spec("int4", width, 2)):
            entries |= times(spec, *[2.0] * len(spec.candidates()))
        entries |= times(Spec("bfloat16", width + 32), *[1.0] * 5)
    of_shapes, of_arrays = (ops.prepare(tree, target, Table(entries)) for tree in (shapes, params))
    assert jax.tree.structure(of_shapes) == jax.tree.structure(of_arrays)
    jax.tree.map(lambda s, x: np.testing.assert_equal((s.shape, s.dtype), (x.shape, x.dtype)), of_shapes, of_arrays)
    again = ops.prepare(of_arrays, target, Table(entries))
    assert jax.tree.structure(again) == jax.tree.structure(of_arrays)
    layer = of_arrays["language_model"]["layers_0"]
    assert ("qkv_proj" in layer["self_attn"], "gate_up_proj" in layer["mlp"]) == ((target is GPU),) * 2
    assert (
        of_arrays["vision_tower"]["position_embedding"]["weight"]
        is plain["vision_tower"]["position_embedding"]["weight"]
    )
    back = ops.unprepare(of_arrays)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    signed = jax.tree.map(ops.dequantize, back, is_leaf=ops.is_weight)
    jax.tree.map(np.testing.assert_array_equal, signed, jax.tree.map(ops.dequantize, params, is_leaf=ops.is_weight))
    if form is None and target.num_rows == 16:
        assert layer["mlp"]["down_proj"]["weight"].padding == 32


def test_float32_that_is_small_stays_a_plain_array():
    weight = struct((64, 64), "float32")
    assert ops.prepare_leaf("language_model/x_proj/weight", weight, CPU, Table()) is weight
    half = ops.prepare_leaf("language_model/x_proj/weight", struct((64, 64)), CPU, Table())
    assert isinstance(half, CpuWeight) and half.kernels == ((None, "x_first"),)


def test_only_large_weights_of_the_decoder_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(
        autotune, "_remembered", lambda name, labels, calls, target: asked.append(name) or dict.fromkeys(labels, 1.0)
    )
    small, large = (struct((rows, 2048)) for rows in (4, 8192))
    decoder = {"norm": struct((2**24,)), "small": small, "large": large}
    ops.tune({"language_model": decoder, "vision_tower": {"large": struct((2048, 4096))}}, CPU)
    assert asked == ["bfloat16 of 2048 inputs"]
    asked.clear()
    table = ops.tune({"language_model": [ops.quantized_shape(large, name) for name in ops.FORMATS]}, CPU)
    assert asked == ["zero point of 8-bit weights", "uint8 of 2048 inputs", "int4 of 2048 inputs in 16 groups"]
    assert table.unsigned
    asked.clear()
    ops.tune({"language_model": [large]}, dataclasses.replace(CPU, num_rows=16))
    assert asked == ["bfloat16 of 2048 inputs", "bfloat16 of 2080 inputs"]
    ops.tune({"language_model": [large]}, GPU)
    assert len(asked) == 2


@pytest.mark.parametrize("unsigned, fast", [(0.6, True), (1.3, True), (3.0, True), (20.0, False)])
def test_unsigned_weights_are_left_where_there_is_no_kernel_for_them(unsigned, fast):
    assert Table({"zero point of 8-bit weights": {"int8": 1.0, "uint8": unsigned}}).unsigned == fast


def test_relative_cost_is_of_the_fastest_kernels():
    weight = struct((8192, 2048))
    entries = times(spec_of(weight, False), 4.0, 8.0, 6.0, 1.0, 3.0)
    cost = [ops.relative_cost({"weight": weight, "norm": struct((8,))}, rows, Table(entries)) for rows in (1, 4, 8, 17)]
    assert cost[:3] == [1.0, 3.0, 6.0] and cost[3] is None
    prepared = ops.prepare_leaf("language_model/x/weight", weight, CPU, Table(entries))
    assert ops.relative_cost([prepared], 8, Table(entries)) == 6.0
    assert ops.relative_cost([weight], 8, Table()) is None and ops.relative_cost([], 8, Table()) is None
    single = struct((8192, 2048), "float32")
    assert ops.relative_cost([single], 8, Table(times(spec_of(single, False), 1.0, 1.0, 1.0))) is None
    few = ops.quantized_shape(weight, "int8")
    entries = times(spec_of(few, False), 2.0, 3.0, 1.0, 1.5)
    assert ops.relative_cost([few], 4, Table(entries)) == 1.5 and ops.relative_cost([few], 5, Table(entries)) is None
