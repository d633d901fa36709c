"""Layers that the image encoder and the decoder share.

Axes: D input features, F output features, V vocabulary.
"""

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_jax import ops


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> ops.Weight:
    """A parameter of a module, made by `init` when there is none.

    Flax's own `param` runs the initialiser whenever it is traced, which is a good part of a start, and knows arrays
    only; shapes are checked when a checkpoint is read.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def run_layer(layer: nn.Module, *args: Any, remat: bool = False) -> Any:
    """Call one of many layers that differ in their weights only.

    The call is a jitted function of the layer's configuration and its weights, so that all layers with the same shapes
    share one trace: tracing a network of 26 layers takes the time of one. With `remat` a gradient keeps what enters the
    layer only, and computes the rest of it again.
    """
    if layer.is_initializing():
        return layer(*args)
    apply = jax.checkpoint(_apply_layer, static_argnums=0) if remat else _apply_layer
    return apply(layer.clone(parent=None, name=None), layer.variables["params"], *args)


@functools.partial(jax.jit, static_argnums=0)
def _apply_layer(layer: nn.Module, params: Any, *args: Any) -> Any:
    return layer.apply({"params": params}, *args)


class Dropout(NamedTuple):
    """Dropout of a training step: values of the decoder's residual branches become 0, the others are scaled up.

    rate: the share that becomes 0.
    keys: u32 [B, 2], a random key for each row, so that a row is the same however a batch is split.
    """

    rate: float
    keys: jax.Array

    def fold_in(self, number: int) -> "Dropout":
        """The same with other keys, for one of several places."""
        return self._replace(keys=jax.vmap(lambda key: jax.random.fold_in(key, number))(self.keys))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drop from x [B, ...]."""
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(self.keys)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class Linear(nn.Module):
    """Affine map; `weight` [F, D] as in the file, `bias` [F] if asked for. The result has `dtype`, or its input's."""

    features: int
    use_bias: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        y = ops.linear(x, parameter(self, "weight", init, (self.features, x.shape[-1])))
        if self.use_bias:
            y = y + ops.along_last(parameter(self, "bias", nn.initializers.zeros, (self.features,)), y)
        return y.astype(self.dtype or x.dtype)


def projections(
    module: nn.Module, x: jax.Array, fused: str, features: dict[str, int], dtype: jnp.dtype | None = None
) -> list[jax.Array]:
    """Several `Linear` maps of the same input within a module: x [..., D] to one [..., F] for each name.

    Where the weights given hold one by the name `fused`, whose rows are those of all in order, it is one matmul.
    """
    if module.has_variable("params", fused):
        y = Linear(sum(features.values()), dtype=dtype, name=fused)(x)
        return jnp.split(y, list(itertools.accumulate(features.values()))[:-1], axis=-1)
    return [Linear(count, dtype=dtype, name=name)(x) for name, count in features.items()]


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return ops.layer_norm(x, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with Gemma's scale of 1 + weight, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.zeros, (x.shape[-1],))
        return ops.rms_norm(x, 1.0 + weight.astype(jnp.float32), self.eps)


class Embedder(nn.Module):
    """Token table [V, D]: `encode` looks rows up, `decode` scores hidden states against all rows (a tied head)."""

    vocab_size: int
    width: int

    def setup(self):
        init = nn.initializers.normal(self.width**-0.5)
        self.weight = parameter(self, "weight", init, (self.vocab_size, self.width))

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Ids [...] to embeddings [..., D], scaled by sqrt(D) rounded to the table's dtype."""
        return ops.take_rows(self.weight, tokens) * jnp.asarray(self.width**0.5, self.weight.dtype)

    def decode(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] to logits, float32 [..., V]."""
        return ops.linear(x, self.weight)
