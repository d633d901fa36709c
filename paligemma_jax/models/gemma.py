"""Gemma and Gemma 2 decoders (arXiv 2403.08295, 2408.00118) with prefix-LM attention.

Axes: B batch, T tokens, n columns (some of the T), S cache slots, D width, N query heads, K key-value heads,
H head dim, L layers, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_jax import ops
from paligemma_jax.config import TextConfig
from paligemma_jax.models.attention import Rotation, prefix_lm_mask, rope, rotation
from paligemma_jax.models.layers import Dropout, Embedder, Linear, RMSNorm, projections, run_layer
from paligemma_jax.ops import Cache, KeyValues


def take_columns(x: jax.Array, columns: jax.Array | None) -> jax.Array:
    """Columns [B, n] of x [B, T, ...], which may repeat; all of them when that is None."""
    if columns is None:
        return x
    return jnp.take_along_axis(x, columns.reshape(*columns.shape, *(1,) * (x.ndim - 2)), axis=1)


class Attention(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        sin_cos: Rotation,
        mask: jax.Array,
        cache: KeyValues | None,
        output_columns: jax.Array | None,
        traced_columns: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues, jax.Array | None]:
        cfg = self.config

        q, k, v = self._queries_keys_values(x, output_columns)
        q, k, v = (part.reshape(*part.shape[:2], -1, cfg.head_dim) for part in (q, k, v))
        q = rope(q, tuple(take_columns(part, output_columns) for part in sin_cos))
        k = jnp.swapaxes(rope(k, sin_cos), 1, 2)
        v = jnp.moveaxis(v, 1, 3)
        if cache is not None:
            k, v = ops.write_cache(cache, (k, v), positions)
        scale, cap = cfg.query_scalar**-0.5, cfg.attn_softcap
        out = ops.attend(q, k, v, scale, take_columns(mask, output_columns), cap)
        out = Linear(x.shape[-1], name="o_proj")(out.reshape(*out.shape[:2], -1))
        if traced_columns is None:
            return out, (k, v), None
        q, mask = (take_columns(part, traced_columns) for part in (q, mask))
        return out, (k, v), ops.attention_probabilities(q, k, scale, mask, cap)

    def _queries_keys_values(self, x: jax.Array, output_columns: jax.Array | None) -> list[jax.Array]:
        """Queries of the columns [B, n, N H], keys and values of all tokens [B, T, K H]."""
        cfg = self.config
        queries = {"q_proj": cfg.num_heads * cfg.head_dim}
        keys_values = dict.fromkeys(("k_proj", "v_proj"), cfg.num_kv_heads * cfg.head_dim)
        if output_columns is None or self.has_variable("params", "qkv_proj"):
            q, *keys_values = projections(self, x, "qkv_proj", queries | keys_values)
            return [take_columns(q, output_columns), *keys_values]
        [q] = projections(self, take_columns(x, output_columns), "", queries)
        return [q, *projections(self, x, "", keys_values)]


class GatedMlp(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # float32 until the last matmul: rounding each step would be less exact and, on CPU, slower.
        features = dict.fromkeys(("gate_proj", "up_proj"), self.mlp_dim)
        gate, up = projections(self, x, "gate_up_proj", features, jnp.float32)
        hidden = nn.gelu(gate, approximate=True) * up
        return Linear(x.shape[-1], name="down_proj")(hidden.astype(x.dtype))


class DecoderLayer(nn.Module):
    """Pre-norm block; Gemma 2 also normalises what attention and MLP return, before the residual sum.

    With `output_columns` [B, n] the result [B, n, D] is of those columns; the keys and values are of all. With
    `traced_columns` [B, n] the last result holds the attention probabilities of those columns, float32 [B, N, n, S].
    `dropout` is applied to what attention and MLP return, before the residual sum (big_vision).
    """

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        sin_cos: Rotation,
        mask: jax.Array,
        cache: KeyValues | None,
        output_columns: jax.Array | None = None,
        traced_columns: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, KeyValues, jax.Array | None]:
        def norm(name: str, y: jax.Array) -> jax.Array:
            return RMSNorm(self.config.rms_norm_eps, name=name)(y)

        def branch(number: int, name: str, y: jax.Array) -> jax.Array:
            y = norm(name, y) if self.config.version == 2 else y
            return y if dropout is None else dropout.fold_in(number)(y)

        y = norm("pre_attention_norm", x)
        attention = Attention(self.config, name="self_attn")
        y, key_values, weights = attention(y, positions, sin_cos, mask, cache, output_columns, traced_columns)
        x = take_columns(x, output_columns) + branch(0, "post_attention_norm", y)
        y = GatedMlp(self.config.mlp_dim, name="mlp")(norm("pre_ffw_norm", x))
        return x + branch(1, "post_ffw_norm", y), key_values, weights


class Gemma(nn.Module):
    """The decoder; `remat`: see `run_layer`."""

    config: TextConfig
    remat: bool = False

    def setup(self):
        cfg = self.config
        self.embed_tokens = Embedder(cfg.vocab_size, cfg.width)
        self.layers = [DecoderLayer(cfg) for _ in range(cfg.num_layers)]
        self.norm = RMSNorm(cfg.rms_norm_eps)
        self.lm_head = None if cfg.tied else Linear(cfg.vocab_size, dtype=jnp.float32)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Ids [B, T] to scaled embeddings [B, T, D]."""
        return self.embed_tokens.encode(tokens)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        prefix_length: jax.Array,
        length: jax.Array,
        cache: Cache | None = None,
        output_columns: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over embeddings x [B, T, D] at `positions` [B, T].

        Without a cache the tokens see each other, and the result holds their keys [B, K, T, H] and values [B, K, H, T]
        per layer. With one they are written into it at their positions and see all of it up to `length` [B]; the result
        holds the new cache. Returns hidden states [B, T, D] after the final norm, and the keys and values. With
        `output_columns` [B, n] the hidden states [B, n, D] are of those columns, the only ones that the last layer
        computes. `dropout` is for training.
        """
        num_keys = x.shape[1] if cache is None else ops.num_cache_slots(cache)
        masks, sin_cos = self._masks(positions, num_keys, prefix_length, length), self._rotation(positions)
        key_values = []
        for i, layer in enumerate(self.layers):
            columns = output_columns if i == self.config.num_layers - 1 else None
            drop = None if dropout is None else dropout.fold_in(i)
            kv = None if cache is None else cache[i]
            x, kv, _ = run_layer(layer, x, positions, sin_cos, masks[i], kv, columns, None, drop, remat=self.remat)
            key_values.append(kv)
        return self.norm(x), tuple(key_values)

    def trace(
        self,
        x: jax.Array,
        positions: jax.Array,
        prefix_length: jax.Array,
        length: jax.Array,
        traced_columns: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """What happens inside `__call__` without a cache, as arrays.

        Returns hidden states [L + 1, B, T, D], those that enter each layer and those that leave the last one, before
        the final norm; and the attention probabilities of the columns `traced_columns` [B, n], float32
        [L, B, N, n, T].
        """
        masks, sin_cos = self._masks(positions, x.shape[1], prefix_length, length), self._rotation(positions)
        hidden, attention = [x], []
        for layer, mask in zip(self.layers, masks, strict=True):
            x, _, weights = run_layer(layer, x, positions, sin_cos, mask, None, None, traced_columns)
            hidden.append(x)
            attention.append(weights)
        return jnp.stack(hidden), jnp.stack(attention)

    def _rotation(self, positions: jax.Array) -> Rotation:
        return rotation(positions, self.config.head_dim, self.config.rope_theta)

    def _masks(
        self, positions: jax.Array, num_keys: int, prefix_length: jax.Array, length: jax.Array
    ) -> list[jax.Array]:
        """The mask [B, T, S] of each layer."""
        windows = [self.config.window(i) for i in range(self.config.num_layers)]
        masks = {w: prefix_lm_mask(positions, num_keys, prefix_length, length, w) for w in set(windows)}
        return [masks[w] for w in windows]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to float32 logits [..., V]; NaN for an infinite one, which a cap would hide."""
        logits = self.embed_tokens.decode(hidden) if self.config.tied else self.lm_head(hidden)
        capped = ops.soft_cap(logits, self.config.final_softcap)
        return ops.materialize(jnp.where(jnp.isfinite(logits), capped, jnp.nan))

    def lens(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] of any layer to the logits [..., V] they would give if it were the last."""
        return self.logits(self.norm(hidden))
