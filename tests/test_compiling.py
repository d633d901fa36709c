"""Programs are compiled with what suits a platform, and for shapes alone."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import compiling
from paligemma_jax.compiling import compiled


class _Recorder:
    """A lowered function that notes the options it is compiled with."""

    def lower(self, *args, **static):
        self.arguments = args, static
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


@pytest.mark.parametrize("platform, options", [("cpu", _ON_CPU), ("gpu", None)])
def test_options_are_those_of_the_platform(monkeypatch, platform, options):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    function = _Recorder()
    assert compiled(function, 1, size=2) is function
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
    program = compiled(jax.jit(function), x)
    with np.errstate(divide="ignore"):
        expected = reference(x.astype(np.float64))
    np.testing.assert_allclose(program(x), expected, rtol=5e-6, atol=1e-30)  # float32 rounds x less the largest
    x[7] = np.nan
    assert np.isnan(np.ravel(program(x))[7 if expected.ndim else 0])


def test_a_program_for_shapes_takes_arrays():
    double = compiled(jax.jit(lambda x: 2 * x), jax.ShapeDtypeStruct((3,), jnp.float32))
    np.testing.assert_array_equal(double(np.arange(3, dtype=np.float32)), [0, 2, 4])


_VNNI = "flags : avx512f avx512_vnni"
_SAID = "--xla_backend_extra_options=-vectorizer-maximize-bandwidth"


@pytest.mark.parametrize(
    "version, processor, platform, flags, expected",
    [
        ((0, 12, 0), _VNNI, "cpu", "", _SAID),
        ((0, 12, 0), _VNNI, "cpu", "--xla_dump_to=here", f"--xla_dump_to=here {_SAID}"),
        ((0, 12, 0), _VNNI, "cpu", "--xla_backend_extra_options=-x", "--xla_backend_extra_options=-x"),
        ((0, 12, 0), _VNNI, "gpu", "", ""),
        ((0, 12, 0), "flags : avx2", "cpu", "", ""),
        ((0, 11, 2), _VNNI, "cpu", "", ""),
        ((0, 13, 0), _VNNI, "cpu", "", ""),
    ],
)
def test_wide_loops_are_asked_for_where_they_are_known_to_help(
    monkeypatch, version, processor, platform, flags, expected
):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(compiling, "processor", lambda: processor)
    monkeypatch.setenv("XLA_FLAGS", flags)
    compiling.use_wide_loops(platform)
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    "platforms, plugins, module, cpu",
    [
        ("cpu", ["cuda"], True, True),
        ("cuda,cpu", [], False, False),
        (None, [], False, True),
        (None, ["metal"], False, False),
        (None, [], True, False),
    ],
)
def test_platform_auto_is_the_cpu_only_where_there_can_be_no_other(monkeypatch, platforms, plugins, module, cpu):
    before = jax.config.jax_platforms
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module or None)
    try:
        jax.config.update("jax_platforms", platforms)
        assert compiling._is_cpu("auto") == cpu
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("flags, expected", [("", "False"), (_SAID, "True")])
def test_whether_loops_are_wide_is_what_xla_has_read(flags, expected):
    code = "from paligemma_jax.compiling import uses_wide_loops; print(uses_wide_loops())"
    environment = os.environ | {"XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert found.stdout.strip() == expected
