"""Next-token cross-entropy over suffixes.

Axes: B rows, T tokens, A answer positions, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.models.layers import Dropout
from paligemma_jax.models.paligemma import PaliGemma, matmul_precision

Batch = dict[str, jax.Array]


def answer_logits(
    model: PaliGemma,
    params: dict,
    soft_tokens: jax.Array,
    batch: Batch,
    num_answers: int,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits f32 [B, A, V] of the first A suffix tokens, their ids [B, A], and which of them exist, bool [B, A].

    The last layer and the unembedding, the largest matmul of a small batch, are computed at their positions only.
    """
    sequence = (batch["tokens"], batch["image_slots"], batch["prefix_length"], batch["length"])
    position = batch["prefix_length"][:, None] + jnp.arange(num_answers)[None, :]
    exists = position < batch["length"][:, None]
    position = jnp.minimum(position, batch["tokens"].shape[1] - 1)
    targets = jnp.take_along_axis(batch["tokens"], position, axis=1)
    said_at = jnp.maximum(position - 1, 0)  # a token is said by the position before it
    hidden, _ = model.apply({"params": params}, soft_tokens, *sequence, said_at, dropout, method="prefill")
    return model.apply({"params": params}, hidden, method="logits"), targets, exists


def mean_where(values: jax.Array, where: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of the values where the mask is true, 0 where it is nowhere true."""
    return jnp.sum(jnp.where(where, values, 0.0), axis) / jnp.maximum(jnp.sum(where, axis), 1)


def token_losses(
    model: PaliGemma,
    params: dict,
    batch: Batch,
    num_answers: int,
    label_smoothing: float = 0.0,
    dropout: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of each suffix token and of the end.

    Args:
      batch: fields of `processing.processor.Batch`; with `dropout` also `dropout_keys` u32 [B, 2], see there.
      num_answers: A, at least the tokens of the longest suffix, its end included.
      label_smoothing: the probability that the target spreads over the other V - 1 tokens.
      dropout: rate of the decoder's.

    Returns:
      Losses f32 [B, A], whether the target was the likeliest token, bool [B, A], and which tokens exist, bool [B, A].
    """
    drop = Dropout(dropout, batch["dropout_keys"]) if dropout else None
    with jax.default_matmul_precision(matmul_precision(params)):
        soft_tokens = model.apply({"params": params}, batch["pixels"], method="embed_image")
        logits, targets, exists = answer_logits(model, params, soft_tokens, batch, num_answers, drop)
    log_probs = jax.nn.log_softmax(logits)
    target_log_probs = jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1)[..., 0]
    losses = -target_log_probs
    if label_smoothing:
        others = (jnp.sum(log_probs, axis=-1) - target_log_probs) / (logits.shape[-1] - 1)
        losses = -(1 - label_smoothing) * target_log_probs - label_smoothing * others
    return losses, jnp.argmax(logits, -1) == targets, exists


def suffix_loss(
    model: PaliGemma, label_smoothing: float, num_answers: int, params: dict, batch: Batch, dropout: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy averaged over the suffix and end of each row, then over the rows (big_vision's transfers).

    A row without a suffix and an end, as padding is, counts nowhere. Arguments as for `token_losses`.
    """
    losses, correct, exists = token_losses(model, params, batch, num_answers, label_smoothing, dropout)
    accuracy = mean_where(correct.astype(jnp.float32), exists)
    loss = mean_where(mean_where(losses, exists, axis=1), jnp.any(exists, axis=1))
    return loss, {"token_acc": accuracy}


def row_losses(model: PaliGemma, num_answers: int, params: dict, batch: Batch) -> jax.Array:
    """The loss of each row alone, without smoothing and dropout: f32 [B]; what validation means over."""
    losses, _, exists = token_losses(model, params, batch, num_answers)
    return mean_where(losses, exists, axis=1)


def dropout_keys(seed: int, step: int, num_rows: int) -> np.ndarray:
    """Random keys of the rows of a step, u32 [B, 2]: a function of seed and step, so that a run can be resumed."""
    return np.random.SeedSequence((seed, step)).generate_state(2 * num_rows).reshape(num_rows, 2)
