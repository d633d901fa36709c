"""The work of a first token against the products that the network is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from benchmarks import machine
from paligemma_jax.models.paligemma import PaliGemma


def product_flops(jaxpr: Jaxpr) -> int:
    """Floating-point operations of all products in a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        values = [*eqn.params.values(), *eqn.params.get("branches", ())[-1:]]  # of the ways of platforms the last one
        for value in values:
            if isinstance(value, ClosedJaxpr | Jaxpr):
                total += product_flops(getattr(value, "jaxpr", value))
    return total


def test_first_token_flops_are_those_of_the_network(config, params):
    num_tokens, side = config.vision.num_tokens + 28, config.vision.image_size
    tokens, length = jnp.zeros((1, num_tokens), jnp.int32), jnp.full((1,), num_tokens)

    def network(pixels):
        return PaliGemma(config).apply({"params": params}, pixels, tokens, tokens, length, length)

    # The network as a whole scores every position, a first token needs one.
    rest = 2 * (num_tokens - 1) * config.text.vocab_size * config.text.width
    program = jax.make_jaxpr(network)(jnp.zeros((1, side, side, 3)))
    assert machine.first_token_flops(config, num_tokens) == product_flops(program.jaxpr) - rest


def test_the_machine_has_cores_memory_and_versions():
    found = machine.describe()
    assert found["jax"] == jax.__version__ and found["cores"] >= 1 and found["memory_gb"] > 0.1


@pytest.mark.slow
def test_each_ceiling_is_found():
    found = machine.ceilings()
    assert set(found) == {"copy_gb_s", "read_gb_s", "matmul_tflop_s"}
    assert all(0 < value < 1e5 for value in found.values())
