"""The language loss: what a model says at the places where an answer belongs.

Axes: B rows, T tokens, A answer places, V vocabulary.
"""

import jax
import jax.numpy as jnp

from paligemma_jax.models.paligemma import PaliGemma


def answer_logits(
    model: PaliGemma, params: dict, soft_tokens: jax.Array, batch: dict[str, jax.Array], num_answers: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits f32 [B, A, V] of the first A suffix tokens, their ids [B, A], and which of them exist, bool [B, A].

    Only those places pass the last layer and meet the vocabulary: the product with it is the largest of a small batch.
    """
    sequence = (batch["tokens"], batch["image_slots"], batch["prefix_length"], batch["length"])
    place = batch["prefix_length"][:, None] + jnp.arange(num_answers)[None, :]
    exists = place < batch["length"][:, None]
    place = jnp.minimum(place, batch["tokens"].shape[1] - 1)
    targets = jnp.take_along_axis(batch["tokens"], place, axis=1)
    said, _ = model.apply({"params": params}, soft_tokens, *sequence, place - 1, method="prefill")
    return model.apply({"params": params}, said, method="logits"), targets, exists


def mean_where(values: jax.Array, where: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of the chosen values, 0 when none is."""
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
    right = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[..., 0]
    losses = -right
    if label_smoothing:
        others = (jnp.sum(log_probs, axis=-1) - right) / (logits.shape[-1] - 1)
        losses = -(1 - label_smoothing) * right - label_smoothing * others
    accuracy = mean_where((jnp.argmax(logits, -1) == targets).astype(jnp.float32), exists)
    return jnp.mean(mean_where(losses, exists, axis=1)), {"token_acc": accuracy}
