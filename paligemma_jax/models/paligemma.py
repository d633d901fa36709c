"""PaliGemma (arXiv 2407.07726, 2412.03555): SigLIP, a linear projector and a Gemma decoder.

Axes: I images, S side in pixels, N soft tokens of an image, E encoder width, B batch, T tokens, n columns (some of the
T), L layers, D decoder width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.layers import Dropout, Linear
from paligemma_jax.models.siglip import SigLIP
from paligemma_jax.ops import Cache


def matmul_precision(params: dict[str, Any]) -> str | None:
    """For `jax.default_matmul_precision`: with float32 weights matmuls are true float32 on every platform."""
    return "highest" if params["language_model"]["norm"]["weight"].dtype == jnp.float32 else None


class Projector(nn.Module):
    """One linear layer from the encoder's width to the decoder's."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Linear(self.width, use_bias=True, name="linear")(x)


class PaliGemma(nn.Module):
    """The whole model; `remat`: gradients keep what enters each layer only (`models.layers.run_layer`)."""

    config: PaliGemmaConfig
    remat: bool = False

    def setup(self):
        self.vision_tower = SigLIP(self.config.vision, self.remat)
        self.multi_modal_projector = Projector(self.config.text.width)
        self.language_model = Gemma(self.config.text, self.remat)

    def encode_image(self, pixels: jax.Array) -> jax.Array:
        """Pixels [I, S, S, 3] in [-1, 1] to the encoder's features of each patch [I, N, E]."""
        return self.vision_tower(pixels)

    def project(self, features: jax.Array) -> jax.Array:
        """Features [I, N, E] of patches to soft tokens [I, N, D]."""
        return self.multi_modal_projector(features)

    def embed_image(self, pixels: jax.Array) -> jax.Array:
        """Pixels [I, S, S, 3] in [-1, 1] to soft tokens [I, N, D]; they enter the decoder unscaled."""
        return self.project(self.encode_image(pixels))

    def embed(self, tokens: jax.Array, image_slots: jax.Array, soft_tokens: jax.Array) -> jax.Array:
        """Sequences [B, T, D]: soft tokens [I, N, D] where `image_slots` [B, T] points at one, else text."""
        text = self.language_model.embed(tokens)
        flat = soft_tokens.reshape(-1, soft_tokens.shape[-1]).astype(text.dtype)
        image = jnp.take(flat, jnp.maximum(image_slots, 0), axis=0)
        return jnp.where((image_slots >= 0)[:, :, None], image, text)

    def prefill(
        self,
        soft_tokens: jax.Array,
        tokens: jax.Array,
        image_slots: jax.Array,
        prefix_length: jax.Array,
        length: jax.Array,
        output_columns: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Whole sequences without a cache: hidden states [B, T, D] and each layer's keys and values.

        With `output_columns` [B, n] the hidden states [B, n, D] are those of these columns. `dropout` is the decoder's.
        """
        x = self.embed(tokens, image_slots, soft_tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.language_model(x, positions, prefix_length, length, None, output_columns, dropout)

    def trace(
        self,
        soft_tokens: jax.Array,
        tokens: jax.Array,
        image_slots: jax.Array,
        prefix_length: jax.Array,
        length: jax.Array,
        traced_columns: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The inside of `prefill`: hidden states [L + 1, B, T, D] and attention [L, B, heads, n, T]; see Gemma."""
        x = self.embed(tokens, image_slots, soft_tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.language_model.trace(x, positions, prefix_length, length, traced_columns)

    def lens(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] of any layer to the logits [..., V] they would give if it were the last."""
        return self.language_model.lens(hidden)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, prefix_length: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Text tokens [B, T] at `positions` [B, T] after what the cache holds: float32 logits [B, T, V], new cache."""
        x = self.language_model.embed(tokens)
        hidden, cache = self.language_model(x, positions, prefix_length, positions[:, -1] + 1, cache)
        return self.language_model.logits(hidden), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to float32 logits [..., V]."""
        return self.language_model.logits(hidden)

    def __call__(
        self,
        pixels: jax.Array,
        tokens: jax.Array,
        image_slots: jax.Array,
        prefix_length: jax.Array,
        length: jax.Array,
    ) -> jax.Array:
        """Logits of every position, float32 [B, T, V]: the whole model in one call."""
        hidden, _ = self.prefill(self.embed_image(pixels), tokens, image_slots, prefix_length, length)
        return self.logits(hidden)
