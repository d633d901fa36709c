"""Programs are compiled with what suits a platform, and for shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.compiling import compiled


class _Recorder:
    """A lowered function that notes the options it is compiled with."""

    def lower(self, *args, **static):
        self.arguments = args, static
        return self

    def compile(self, options):
        self.options = options
        return self


@pytest.mark.parametrize("platform, options", [("cpu", {"xla_cpu_prefer_vector_width": 512}), ("gpu", None)])
def test_options_are_those_of_the_platform(monkeypatch, platform, options):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    function = _Recorder()
    assert compiled(function, 1, size=2) is function
    assert function.options == options and function.arguments == ((1,), {"size": 2})


def test_a_program_for_shapes_takes_arrays():
    double = compiled(jax.jit(lambda x: 2 * x), jax.ShapeDtypeStruct((3,), jnp.float32))
    np.testing.assert_array_equal(double(np.arange(3, dtype=np.float32)), [0, 2, 4])
