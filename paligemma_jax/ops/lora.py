"""A weight with a low-rank change beside it: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

Axes: M rows, F outputs, D inputs, r rank.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.ops.kernels import Sized
from paligemma_jax.ops.weights import Weight, dequantize, is_weight, linear, take_rows

_matmul = functools.partial(jnp.matmul, precision="highest")  # true float32 on every platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Lora(Sized):
    """The weight [F, D] `base + scale * up @ down`, with DoRA its rows scaled to the norms in `magnitude`.

    The low-rank branch is computed in float32 from the activations as they come, as PEFT does where the base is
    narrower. It is differentiable with respect to activations, `down`, `up` and `magnitude`; the norm that DoRA divides
    by counts as a constant, as in PEFT. There is no dropout.

    base: plain, `Int8` or `Int4`, and never changed.
    down: f32 [r, D], PEFT's lora_A; of an embedding table [V, D] its transposed lora_embedding_B.
    up: f32 [F, r], PEFT's lora_B; of a table its transposed lora_embedding_A.
    magnitude: f32 [F], or None for plain LoRA.
    scale: alpha / r, with rsLoRA (arXiv 2312.03732) alpha / sqrt(r).
    """

    base: Weight
    down: jax.Array
    up: jax.Array
    magnitude: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def matmul(self, x: jax.Array) -> jax.Array:
        """Activations [M, D] times the weight: float32 [M, F]."""
        change = _matmul(_matmul(x.astype(jnp.float32), self.down.T), self.up.T)
        y = linear(x, self.base) + self.scale * change
        return y if self.magnitude is None else y * self._factors()[None]

    def take(self, index: jax.Array) -> jax.Array:
        """Rows [..., D] at an index [...], as numbers of the base's dtype."""
        change = _matmul(jnp.take(self.up, index, axis=0), self.down)
        rows = take_rows(self.base, index).astype(jnp.float32) + self.scale * change
        if self.magnitude is not None:
            rows = rows * jnp.take(self._factors(), index)[..., None]
        return rows.astype(self.dtype)

    def dequantize(self) -> jax.Array:
        """The merged weight [F, D]: summed in float32 and rounded once to the base's dtype."""
        merged = dequantize(self.base).astype(jnp.float32) + self.scale * _matmul(self.up, self.down)
        if self.magnitude is not None:
            merged = merged * self._factors()[:, None]
        return merged.astype(self.dtype)

    def _factors(self) -> jax.Array:
        """What DoRA multiplies the rows by: f32 [F]."""
        return self.magnitude / lax.stop_gradient(row_norms(self.base, self.down, self.up, self.scale))

    def __repr__(self) -> str:
        kind = "LoRA" if self.magnitude is None else "DoRA"
        base = self.base if is_weight(self.base) else f"{self.dtype}{list(self.shape)}"
        return f"{kind}(rank {len(self.down)}, scale {self.scale:g}, over {base})"


def row_norms(base: Weight, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """Norms of the rows of `base + scale * up @ down`: f32 [F], above 0.

    By |w + s u A|^2 = |w|^2 + 2 s (w A^T) u + s^2 u (A A^T) u, which takes no array of the weight's size in float32.
    """
    weight = dequantize(base)
    squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=1)
    mixed = _matmul(weight.astype(jnp.float32), down.T)
    squares += jnp.sum((2 * scale * mixed + scale**2 * _matmul(up, _matmul(down, down.T))) * up, axis=1)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
