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
        ((0, 12, 0), _VNNI, "cpu", "flags.txt", "flags.txt"),
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


def _in_a_process(code: str, flags: str) -> str:
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.strip()


def test_whole_products_are_exact_with_wide_loops_and_xla_tells_of_them():
    code = """
import jax, jax.numpy as jnp, numpy as np
from paligemma_jax.compiling import compiled, uses_wide_loops
from paligemma_jax.models import few_rows
rng = np.random.default_rng(0)
for num_rows in (1, 4, 5, 16):
    rows, weight = rng.choice([-128, -127, 127], (num_rows, 2304)), rng.choice([0, 1, 255], (40, 2304))
    operands = jnp.asarray(rows, jnp.int8), jnp.asarray(weight, jnp.uint8)
    found = compiled(jax.jit(few_rows.whole_product), *operands)(*operands)
    np.testing.assert_array_equal(found, rows @ weight.T)
print(uses_wide_loops())
"""
    assert [_in_a_process(code, flags) for flags in ("", _SAID)] == ["False", "True"]


def test_the_platform_is_selected_with_wide_loops():
    code = f"""
from ml_collections import ConfigDict
from paligemma_jax import compiling
from paligemma_jax.runs import environment
compiling.processor = lambda: {_VNNI!r}
environment.select_platform(ConfigDict({{"platform": "cpu"}}))
print(compiling.uses_wide_loops())
"""
    first, end = compiling._WITH_WIDE_LOOPS
    assert _in_a_process(code, "") == str(first <= jax.__version_info__ < end)
