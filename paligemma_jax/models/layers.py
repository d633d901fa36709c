"""Layers that the image encoder and the decoder share.

Axes: M rows, D input features, F output features, V vocabulary.
"""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.models import cpu, quantized
from paligemma_jax.models.padded import Padded
from paligemma_jax.models.quantized import Quantized, Weight

JOINT = "+"  # between the names of weights that are one parameter


def linear(x: jax.Array, weight: Weight) -> jax.Array:
    """Product of activations [..., D] with a weight in file orientation [F, D]: float32 [..., F].

    The activations take the weight's dtype, or 8 bits if it is quantized and rounds them; sums are kept in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantized):
        y = quantized.product(rows, weight)
    elif isinstance(weight, Padded):
        y = cpu.product(weight.pad(rows.astype(weight.dtype)), weight.values)
    else:
        y = cpu.product(rows.astype(weight.dtype), weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def measure(params: Any, num_rows: int = 1) -> None:
    """Measure what `linear` will ask about some parameters, which may be shapes, and one row or so many: now, because
    nothing else runs."""
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized)):
        if isinstance(leaf, Quantized) and leaf.rounds:
            for count in sorted({1, num_rows}):
                quantized.sums_win(leaf, count)
        elif leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            cpu.weight_first(leaf, 1)
            cpu.sums_win(leaf, 1)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector [D] as float32 with the rank of x [..., D], so that every broadcast is written out."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)


def _mean(x: jax.Array) -> jax.Array:
    """Over the last axis, which is kept."""
    return cpu.total(x) / x.shape[-1]


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Weight:
    """A parameter of a module, made by `init` when there is none.

    Flax's own `param` works the initialiser out again whenever it is traced, which is a good part of a start, and knows
    arrays only; shapes are checked when a checkpoint is read.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def run_layer(layer: nn.Module, *args: Any) -> Any:
    """Call one of many layers that are alike but for their weights: it is traced once for all."""
    if layer.is_initializing():
        return layer(*args)
    return _applied(layer.clone(parent=None, name=None), layer.variables["params"], *args)


@functools.partial(jax.jit, static_argnums=0)
def _applied(module: nn.Module, params: Any, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


class Linear(nn.Module):
    """Affine map; `weight` [F, D] as in the file, `bias` [F] if asked for. The result has `dtype`, or its input's."""

    features: int
    use_bias: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        y = linear(x, parameter(self, "weight", init, (self.features, x.shape[-1])))
        if self.use_bias:
            y = y + along_last(parameter(self, "bias", nn.initializers.zeros, (self.features,)), y)
        return y.astype(self.dtype or x.dtype)


def linear_maps(
    module: nn.Module, x: jax.Array, features: dict[str, int], dtype: jnp.dtype | None = None
) -> list[jax.Array]:
    """Several `Linear` maps of the same input, by name, within a module; some may have one weight.

    That is then the parameter `a+b`, whose rows are those of `a` and after them those of `b`; it may not hold others
    than are asked for.
    """
    joined = {name: whole for whole in module.variables.get("params", {}) for name in whole.split(JOINT)}
    results = {}
    for whole in dict.fromkeys(joined.get(name, name) for name in features):
        names = whole.split(JOINT)
        y = Linear(sum(features[name] for name in names), dtype=dtype, name=whole)(x)
        starts = list(itertools.accumulate(features[name] for name in names))
        results |= zip(names, jnp.split(y, starts[:-1], axis=-1), strict=True)
    return [results[name] for name in features]


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - _mean(y)
        y = y * lax.rsqrt(_mean(jnp.square(y)) + self.eps)
        return (y * along_last(weight, y) + along_last(bias, y)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with Gemma's scale of 1 + weight, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(_mean(jnp.square(y)) + self.eps)
        return (y * (1.0 + along_last(weight, y))).astype(x.dtype)


class Embedder(nn.Module):
    """Token table [V, D], tied: `encode` looks rows up, `decode` scores hidden states against all rows."""

    vocab_size: int
    width: int

    def setup(self):
        init = nn.initializers.normal(self.width**-0.5)
        self.weight = parameter(self, "weight", init, (self.vocab_size, self.width))

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Ids [...] to embeddings [..., D], scaled by sqrt(D) rounded to the table's dtype."""
        scale = jnp.asarray(self.width**0.5, self.weight.dtype)
        return quantized.rows_of(self.weight, tokens) * scale

    def decode(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] to logits, float32 [..., V]."""
        return linear(x, self.weight)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Squash to (-cap, cap) by tanh; the identity without a cap (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
