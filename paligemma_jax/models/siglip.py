"""SigLIP image encoder (arXiv 2303.15343): a pre-norm ViT without a class token.

Axes: B images, S side in pixels, P patch side, N = (S / P)^2 patches row by row, D width.
"""

import flax.linen as nn
import jax

from paligemma_jax.config import VisionConfig
from paligemma_jax.models.encoder import EncoderLayer, PatchEmbedding, PositionEmbedding
from paligemma_jax.models.layers import LayerNorm, run_layer


class SigLIP(nn.Module):
    """The encoder; `remat`: see `run_layer`."""

    config: VisionConfig
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3] in [-1, 1] to patch features [B, N, D] in the dtype of the weights."""
        cfg = self.config
        x = PatchEmbedding(cfg.width, cfg.patch_size, name="patch_embedding")(pixels)
        x = x + PositionEmbedding(cfg.num_tokens, cfg.width, name="position_embedding")()[None]
        for i in range(cfg.num_layers):
            layer = EncoderLayer(cfg.width, cfg.num_heads, cfg.mlp_dim, cfg.layer_norm_eps, name=f"layers_{i}")
            x = run_layer(layer, x, remat=self.remat)
        return LayerNorm(cfg.layer_norm_eps, name="post_layernorm")(x)
