"""The multimodal patch-embedding ViT: an image embedding that is a convex sum of patch embeddings in CLIP's text space.

It has neither a class token nor a projection. Each of its A heads is one channel wider than its share of the embedding:
the extra channels, averaged over the heads, say how much of the sum a patch is. Source:
https://github.com/TinyVolt/multimodal-patch-embeddings

Axes: B images, S side in pixels, N = G^2 patches row by row, A heads, H channels of a head, D = A H embedding,
W = A (H + 1) width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.models.encoder import EncoderLayer, PatchEmbedding, PositionEmbedding
from paligemma_jax.models.layers import LayerNorm, parameter, run_layer
from paligemma_jax.patch_vit.config import StudentConfig


def neighbour_mask(grid: int) -> np.ndarray:
    """Which patches each may see: bool [N, N], those within one step, diagonals included.

    Patch 5 of a grid of 4 sees, laid out as the grid,

        1 1 1 0
        1 1 1 0
        1 1 1 0
        0 0 0 0

    A corner has 4, an edge 6, a patch inside 9.
    """
    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.maximum(abs(row[:, None] - row), abs(column[:, None] - column)) <= 1


class PatchViT(nn.Module):
    """The network; `ln_post` is in the files of the original and never used."""

    config: StudentConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, S, S, 3] to patch embeddings f32 [B, N, D] and their probabilities f32 [B, N].

        With `same_norm`, each embedding is divided by its norm and multiplied by the parameter `scale`, of which
        `max_scale` is the most.
        """
        cfg = self.config
        x = PatchEmbedding(cfg.width, cfg.patch_size, use_bias=False, name="patch_embedding")(pixels)
        x = x + PositionEmbedding(cfg.num_patches, cfg.width, name="position_embedding")()[None]
        x = LayerNorm(cfg.layer_norm_eps, name="ln_pre")(x)
        mask = jnp.asarray(neighbour_mask(cfg.grid))[None] if cfg.masked else None
        sizes = (cfg.width, cfg.num_heads, cfg.mlp_dim, cfg.layer_norm_eps, "quick_gelu", True)
        for i in range(cfg.num_layers):
            x = run_layer(EncoderLayer(*sizes, name=f"layers_{i}"), x, mask)
        if self.is_initializing():
            LayerNorm(name="ln_post")(jnp.zeros((1, cfg.embed_dim)))
        heads = x.astype(jnp.float32).reshape(*x.shape[:2], cfg.num_heads, -1)
        logits = jnp.mean(heads[..., -1], axis=-1)
        embeddings = heads[..., :-1].reshape(*x.shape[:2], cfg.embed_dim)
        scale = parameter(self, "scale", nn.initializers.ones, (1,)) if cfg.has_scale else None
        if cfg.same_norm:
            norm = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
            embeddings = embeddings / norm * jnp.minimum(scale.astype(jnp.float32), cfg.max_scale)[None, None]
        return embeddings, jax.nn.softmax(logits / cfg.temperature, axis=-1)

    def embed(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, S, S, 3] to image embeddings f32 [B, D], not normalised, and the probabilities f32 [B, N]."""
        embeddings, probabilities = self(pixels)
        return pool(embeddings, probabilities), probabilities


def pool(embeddings: jax.Array, probabilities: jax.Array) -> jax.Array:
    """The image embedding [B, D]: patch embeddings [B, N, D] summed by their probabilities [B, N]."""
    return jnp.einsum("bn,bnd->bd", probabilities, embeddings, precision=jax.lax.Precision.HIGHEST)
