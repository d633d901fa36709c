"""SigLIP image encoder (arXiv 2303.15343): a pre-norm ViT without a class token.

Axes: B images, S side in pixels, P patch side, N = (S / P)^2 patches row by row, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_jax import ops
from paligemma_jax.config import VisionConfig
from paligemma_jax.models.layers import LayerNorm, Linear, parameter, run_layer


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as one matmul; `weight` [D, 3, P, P] keeps the file's shape."""

    width: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        batch, side, _, channels = pixels.shape
        size = self.patch_size
        grid = side // size
        init = nn.initializers.lecun_normal(in_axis=(1, 2, 3), out_axis=0)
        weight = parameter(self, "weight", init, (self.width, channels, size, size))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.width,))
        patches = pixels.reshape(batch, grid, size, grid, size, channels).transpose(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(batch, grid * grid, channels * size * size)
        y = ops.linear(patches, weight.reshape(self.width, -1))
        return (y + ops.along_last(bias, y)).astype(weight.dtype)


class PositionEmbedding(nn.Module):
    """Learned positions `weight` [N, D]."""

    num_positions: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "weight", nn.initializers.normal(self.width**-0.5), (self.num_positions, self.width))


class SelfAttention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        heads = (*x.shape[:2], self.num_heads, width // self.num_heads)
        q, k, v = (Linear(width, use_bias=True, name=f"{name}_proj")(x).reshape(heads) for name in "qkv")
        out = ops.attend(q, jnp.swapaxes(k, 1, 2), jnp.moveaxis(v, 1, 3), heads[-1] ** -0.5)
        return Linear(width, use_bias=True, name="out_proj")(out.reshape(x.shape))


class Mlp(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(self.mlp_dim, use_bias=True, dtype=jnp.float32, name="fc1")(x)
        hidden = nn.gelu(hidden, approximate=True).astype(x.dtype)
        return Linear(x.shape[-1], use_bias=True, name="fc2")(hidden)


class EncoderLayer(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        eps = self.config.layer_norm_eps
        x = x + SelfAttention(self.config.num_heads, name="self_attn")(LayerNorm(eps, name="layer_norm1")(x))
        return x + Mlp(self.config.mlp_dim, name="mlp")(LayerNorm(eps, name="layer_norm2")(x))


class SigLIP(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3] in [-1, 1] to patch features [B, N, D] in the dtype of the weights."""
        cfg = self.config
        x = PatchEmbedding(cfg.width, cfg.patch_size, name="patch_embedding")(pixels)
        x = x + PositionEmbedding(cfg.num_tokens, cfg.width, name="position_embedding")()[None]
        for i in range(cfg.num_layers):
            x = run_layer(EncoderLayer(cfg, name=f"layers_{i}"), x)
        return LayerNorm(cfg.layer_norm_eps, name="post_layernorm")(x)
