"""Next-token cross-entropy over suffixes.

Axes: B rows, T tokens, A answer positions, V vocabulary.
"""

import jax
import jax.numpy as jnp

from paligemma_jax.models.paligemma import PaliGemma


def answer_logits(
    model: PaliGemma, params: dict, soft_tokens: jax.Array, batch: dict[str, jax.Array], num_answers: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits f32 [B, A, V] of the first A suffix tokens, their ids [B, A], and which of them exist, bool [B, A].

    The last layer and the unembedding, the largest matmul of a small batch, are computed at their positions only.
    """
    sequence = (batch["tokens"], batch["image_slots"], batch["prefix_length"], batch["length"])
    position = batch["prefix_length"][:, None] + jnp.arange(num_answers)[None, :]
    exists = position < batch["length"][:, None]
    position = jnp.minimum(position, batch["tokens"].shape[1] - 1)
    targets = jnp.take_along_axis(batch["tokens"], position, axis=1)
    hidden, _ = model.apply({"params": params}, soft_tokens, *sequence, position - 1, method="prefill")
    return model.apply({"params": params}, hidden, method="logits"), targets, exists


def mean_where(values: jax.Array, where: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of the values where the mask is true, 0 where it is nowhere true."""
    return jnp.sum(jnp.where(where, values, 0.0), axis) / jnp.maximum(jnp.sum(where, axis), 1)


def suffix_loss(
    model: PaliGemma, label_smoothing: float, num_answers: int, params: dict, batch: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy averaged over the suffix and end of each row, then over the rows (big_vision's transfers).

    `label_smoothing` is the probability that the target spreads over the other V - 1 tokens.
    """
    soft_tokens = model.apply({"params": params}, batch["pixels"], method="embed_image")
    logits, targets, exists = answer_logits(model, params, soft_tokens, batch, num_answers)
    log_probs = jax.nn.log_softmax(logits)
    target_log_probs = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[..., 0]
    losses = -target_log_probs
    if label_smoothing:
        others = (jnp.sum(log_probs, axis=-1) - target_log_probs) / (logits.shape[-1] - 1)
        losses = -(1 - label_smoothing) * target_log_probs - label_smoothing * others
    accuracy = mean_where((jnp.argmax(logits, -1) == targets).astype(jnp.float32), exists)
    return jnp.mean(mean_where(losses, exists, axis=1)), {"token_acc": accuracy}
