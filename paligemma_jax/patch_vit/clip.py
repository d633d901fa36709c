"""CLIP's image and text towers (arXiv 2103.00020), as transformers' CLIPModel has them.

Axes: B images or texts, S side in pixels, N patches row by row, T tokens, D width of a tower, P of the shared space.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_jax.models.encoder import EncoderLayer, PatchEmbedding, PositionEmbedding
from paligemma_jax.models.layers import LayerNorm, Linear, parameter, run_layer
from paligemma_jax.patch_vit.config import ClipConfig, ClipTextConfig, ClipVisionConfig

_INITIAL_SCALE = 2.6592  # log(1 / 0.07)
_FIRST_RELEASES_EOS = 2  # what their config.json says, where the end of a text has the largest id


def _layers(cfg: ClipVisionConfig | ClipTextConfig) -> list[EncoderLayer]:
    sizes = (cfg.width, cfg.num_heads, cfg.mlp_dim, cfg.layer_norm_eps, cfg.activation)
    return [EncoderLayer(*sizes) for _ in range(cfg.num_layers)]


class VisionTower(nn.Module):
    config: ClipVisionConfig

    def setup(self):
        cfg = self.config
        self.patch_embedding = PatchEmbedding(cfg.width, cfg.patch_size, use_bias=False)
        self.class_embedding = parameter(self, "class_embedding", nn.initializers.normal(cfg.width**-0.5), (cfg.width,))
        self.position_embedding = PositionEmbedding(cfg.num_tokens + 1, cfg.width)
        self.pre_layernorm = LayerNorm(cfg.layer_norm_eps)
        self.layers = _layers(cfg)
        self.post_layernorm = LayerNorm(cfg.layer_norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3] to the class token [B, D]."""
        return self.class_token(self.before_last(pixels))

    def class_token(self, x: jax.Array) -> jax.Array:
        """The class token [B, D] by the last layer of what enters it [B, 1 + N, D]."""
        return self.post_layernorm(self.layers[-1](x, num_queries=1)[:, 0])

    def before_last(self, pixels: jax.Array) -> jax.Array:
        """What enters the last layer: the class token and the patches [B, 1 + N, D]."""
        patches = self.patch_embedding(pixels)
        first = jnp.broadcast_to(self.class_embedding[None, None], (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([first.astype(patches.dtype), patches], axis=1)
        x = self.pre_layernorm(x + self.position_embedding()[None])
        for layer in self.layers[:-1]:
            x = run_layer(layer, x)
        return x

    def cls_attention(self, pixels: jax.Array) -> jax.Array:
        """How much the class token of the last layer looks at each patch: f32 [B, N], the mean over heads."""
        probabilities = self.layers[-1].probabilities(self.before_last(pixels))
        return jnp.mean(probabilities[:, :, 0, 1:], axis=1)

    def self_self(self, pixels: jax.Array) -> jax.Array:
        """Patches [B, N, D] by self-self attention in the last layer, see `EncoderLayer.self_self`."""
        return self.post_layernorm(self.layers[-1].self_self(self.before_last(pixels))[:, 1:])


class TextTower(nn.Module):
    config: ClipTextConfig

    def setup(self):
        cfg = self.config
        init = nn.initializers.normal(0.02)
        self.token_embedding = parameter(self, "token_embedding", init, (cfg.vocab_size, cfg.width))
        self.position_embedding = PositionEmbedding(cfg.context, cfg.width)
        self.layers = _layers(cfg)
        self.final_layer_norm = LayerNorm(cfg.layer_norm_eps)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Ids i32 [B, T], padded after their end token, to the end token's state [B, D].

        Each token sees those before it, so padding changes nothing.
        """
        length = tokens.shape[1]
        x = jnp.take(self.token_embedding, tokens, axis=0) + self.position_embedding()[None, :length]
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        for layer in self.layers:
            x = run_layer(layer, x, causal)
        eos = self.config.eos_token_id
        is_end = tokens == (jnp.max(tokens, axis=1, keepdims=True) if eos == _FIRST_RELEASES_EOS else eos)
        end = jnp.argmax(is_end, axis=1)
        return self.final_layer_norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class ClipModel(nn.Module):
    """Both towers and their projections; `logit_scale` is the log of the inverse temperature."""

    config: ClipConfig

    def setup(self):
        self.vision_model = VisionTower(self.config.vision)
        self.text_model = TextTower(self.config.text)
        self.visual_projection = Linear(self.config.projection_dim)
        self.text_projection = Linear(self.config.projection_dim)
        self.logit_scale = parameter(self, "logit_scale", nn.initializers.constant(_INITIAL_SCALE), ())

    def __call__(self, pixels: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Image and text embeddings, f32 [B, P] each, and the logit scale."""
        return self.embed_image(pixels), self.embed_text(tokens), self.logit_scale

    def embed_image(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3] to f32 [B, P], not normalised."""
        return self.visual_projection(self.vision_model(pixels)).astype(jnp.float32)

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """Ids i32 [B, T] to f32 [B, P], not normalised."""
        return self.text_projection(self.text_model(tokens)).astype(jnp.float32)

    def before_last(self, pixels: jax.Array) -> jax.Array:
        """See `VisionTower.before_last`."""
        return self.vision_model.before_last(pixels)

    def cls_attention(self, pixels: jax.Array) -> jax.Array:
        """f32 [B, N], see `VisionTower.cls_attention`."""
        return self.vision_model.cls_attention(pixels)

    def self_self_attention_patches(self, pixels: jax.Array) -> jax.Array:
        """Patches in the text space without training, f32 [B, N, P], see `VisionTower.self_self`."""
        return self.visual_projection(self.vision_model.self_self(pixels)).astype(jnp.float32)
