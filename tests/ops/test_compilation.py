"""Programs are compiled with what suits a target, and for shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.ops import Target, compiled


class _Recorder:
    """A function that notes what it is traced for and the options it is compiled with."""

    def trace(self, *args, **static):
        self.arguments = args, static
        return self

    def lower(self):
        return self

    def compile(self, options):
        self.options = options
        return self


_ON_CPU = {
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_nans": True,
}


@pytest.mark.parametrize("platform, options", [("cpu", _ON_CPU), ("cuda", None), ("tpu", None)])
def test_options_are_those_of_the_platform(platform, options):
    function = _Recorder()
    assert compiled(Target(platform), function, 1, size=2) is function
    assert function.options == options and function.arguments == ((1,), {"size": 2})


@pytest.mark.parametrize(
    "function, reference",
    [
        (lambda x: jax.nn.softmax(x, axis=-1), lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()),
        (lambda x: jax.nn.logsumexp(x, axis=-1), lambda x: np.log(np.exp(x - x.max()).sum()) + x.max()),
        (jnp.exp, np.exp),
        (jnp.tanh, np.tanh),
    ],
)
def test_additions_in_any_order_heed_what_is_infinite_or_no_number(function, reference):
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32) * 20
    x[::3] = -np.inf
    program = compiled(Target("cpu"), jax.jit(function), x)
    with np.errstate(divide="ignore"):
        expected = reference(x.astype(np.float64))
    np.testing.assert_allclose(program(x), expected, rtol=5e-6, atol=1e-30)  # float32 rounds x less the largest
    x[7] = np.nan
    assert np.isnan(np.ravel(program(x))[7 if expected.ndim else 0])


def test_a_program_for_shapes_takes_arrays():
    double = compiled(Target("cpu"), jax.jit(lambda x: 2 * x), jax.ShapeDtypeStruct((3,), jnp.float32))
    np.testing.assert_array_equal(double(np.arange(3, dtype=np.float32)), [0, 2, 4])


def test_this_machine_is_detected():
    target = Target.detect(num_rows=3)
    assert (target.platform, target.num_rows) == ("cpu", 3) and target.cores >= 1 and len(target.processor) == 12
    assert target == Target.detect(3) != Target.detect()


def test_what_is_no_cpu_has_no_processor(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert Target.detect(2) == Target("tpu", num_rows=2)
