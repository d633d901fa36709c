"""Parts of vision transformers: SigLIP's, CLIP's (its text tower is made of them too) and the patch ViT's.

Axes: B images, S side in pixels, P patch side, N = (S / P)^2 patches row by row, T tokens, D width, A heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_jax import ops
from paligemma_jax.models.layers import LayerNorm, Linear, parameter


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": quick_gelu,
}


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as one matmul; `weight` [D, 3, P, P] keeps the file's shape."""

    width: int
    patch_size: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        batch, side, _, channels = pixels.shape
        size = self.patch_size
        grid = side // size
        init = nn.initializers.lecun_normal(in_axis=(1, 2, 3), out_axis=0)
        weight = parameter(self, "weight", init, (self.width, channels, size, size))
        patches = pixels.reshape(batch, grid, size, grid, size, channels).transpose(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(batch, grid * grid, channels * size * size)
        y = ops.linear(patches, weight.reshape(self.width, -1))
        if self.use_bias:
            y = y + ops.along_last(parameter(self, "bias", nn.initializers.zeros, (self.width,)), y)
        return y.astype(weight.dtype)


class PositionEmbedding(nn.Module):
    """Learned positions `weight` [N, D]."""

    num_positions: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "weight", nn.initializers.normal(self.width**-0.5), (self.num_positions, self.width))


class SelfAttention(nn.Module):
    """Multi-head self-attention; `fused`: the three input projections are one weight `in_proj` [3 D, D]."""

    width: int
    num_heads: int
    fused: bool = False

    def setup(self):
        if self.fused:
            self.in_proj = Linear(3 * self.width, use_bias=True)
        else:
            self.q_proj, self.k_proj, self.v_proj = (Linear(self.width, use_bias=True) for _ in range(3))
        self.out_proj = Linear(self.width, use_bias=True)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, num_queries: int | None = None) -> jax.Array:
        """Tokens [B, T, D]; `mask` bool [B or 1, T, T] says which keys a query sees, None is all.

        With `num_queries` only the first so many tokens are computed: [B, num_queries, D].
        """
        q, k, v = self._heads(x, num_queries)
        out = ops.attend(q, jnp.swapaxes(k, 1, 2), jnp.moveaxis(v, 1, 3), self._scale, mask)
        return self.out_proj(out.reshape(*out.shape[:2], self.width))

    def probabilities(self, x: jax.Array) -> jax.Array:
        """How much each token of [B, T, D] looks at each: float32 [B, A, T, T]."""
        q, k, _ = self._heads(x)
        return ops.attention_probabilities(q, jnp.swapaxes(k, 1, 2), self._scale)

    def self_self(self, x: jax.Array) -> jax.Array:
        """Values of [B, T, D] mixed by the mean of query-query and key-key attention, projected as usual."""
        q, k, v = self._heads(x)
        pairs = (ops.attention_probabilities(y, jnp.swapaxes(y, 1, 2), self._scale) for y in (q, k))
        out = jnp.einsum("bnts,bsnh->btnh", sum(pairs) / 2, v.astype(jnp.float32))
        return self.out_proj(out.reshape(x.shape).astype(x.dtype))

    @property
    def _scale(self) -> float:
        return (self.width // self.num_heads) ** -0.5

    def _heads(self, x: jax.Array, num_queries: int | None = None) -> list[jax.Array]:
        """Queries, of the first tokens only if so asked, keys and values, each [B, T, A, D / A]."""
        if self.fused:
            q, k, v = jnp.split(self.in_proj(x), 3, axis=-1)
            q = q[:, :num_queries]
        else:
            q, k, v = self.q_proj(x[:, :num_queries]), self.k_proj(x), self.v_proj(x)
        return [part.reshape(*part.shape[:2], self.num_heads, -1) for part in (q, k, v)]


class Mlp(nn.Module):
    mlp_dim: int
    activation: str = "gelu_pytorch_tanh"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(self.mlp_dim, use_bias=True, dtype=jnp.float32, name="fc1")(x)
        hidden = ACTIVATIONS[self.activation](hidden).astype(x.dtype)
        return Linear(x.shape[-1], use_bias=True, name="fc2")(hidden)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to what enters it."""

    width: int
    num_heads: int
    mlp_dim: int
    eps: float
    activation: str = "gelu_pytorch_tanh"
    fused: bool = False

    def setup(self):
        self.layer_norm1, self.layer_norm2 = LayerNorm(self.eps), LayerNorm(self.eps)
        self.self_attn = SelfAttention(self.width, self.num_heads, self.fused)
        self.mlp = Mlp(self.mlp_dim, self.activation)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, num_queries: int | None = None) -> jax.Array:
        """Tokens [B, T, D]; `mask` and `num_queries` as of `SelfAttention`."""
        x = x[:, :num_queries] + self.self_attn(self.layer_norm1(x), mask, num_queries)
        return x + self.mlp(self.layer_norm2(x))

    def probabilities(self, x: jax.Array) -> jax.Array:
        """Attention probabilities of the layer: float32 [B, A, T, T]."""
        return self.self_attn.probabilities(self.layer_norm1(x))

    def self_self(self, x: jax.Array) -> jax.Array:
        """The attention's output alone, by self-self attention, without residual and MLP (ClearCLIP, 2407.12442)."""
        return self.self_attn.self_self(self.layer_norm1(x))
