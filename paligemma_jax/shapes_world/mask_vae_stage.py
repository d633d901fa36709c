"""Training of the mask VQ-VAE: reconstruction, commitment, and a codebook that follows its vectors.

Source: van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937), appendix A.1.
Axes: B masks, S side in pixels, N vectors in a batch, E code width, K codes.
"""

import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from paligemma_jax.errors import DataError
from paligemma_jax.models.mask_vae import MASK_SIZE, MaskVAE, MaskVAEConfig, Params, init_params

_COMMITMENT = 0.25
_DECAY = 0.9  # of the codebook's running averages, per step
_SLOW_DECAY = 0.99  # the same when training goes on with a codebook, whose codes should keep their meaning
_GIVEN_COUNT = 16.0  # vectors that each code of such a codebook is taken to stand for at first
_DEAD = 0.25  # a code used less than this part of its fair share is moved
_CLIP_NORM = 1.0
_LOG_EVERY = 50  # steps


class State(NamedTuple):
    params: Params
    optimizer: optax.OptState
    counts: jax.Array  # [K] running average of the vectors that each code stands for, per batch
    sums: jax.Array  # [K, E] running average of their sum
    key: jax.Array


class Metrics(NamedTuple):
    loss: jax.Array
    iou: jax.Array  # mean intersection over union of the masks and their reconstructions
    used: jax.Array  # part of the codebook that the batch uses


def make_optimizer(num_steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam with a short warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 20, num_steps)
    return optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(schedule))


def init_state(
    key: jax.Array, config: MaskVAEConfig, optimizer: optax.GradientTransformation, params: Params | None = None
) -> State:
    """The first state: random, or that of `params`, if given, whose codebook stays near where it is.

    For random parameters nothing is counted yet, so the first step moves the codebook to vectors of its batch.
    """
    key, init_key = jax.random.split(key)
    given = params is not None
    params = params if given else init_params(init_key, config)
    codebook = params["codebook"]
    counts = jnp.full(len(codebook), _GIVEN_COUNT if given else 0.0)
    return State(params, optimizer.init(params), counts, counts[:, None] * codebook, key)


def train_step(
    state: State, masks: jax.Array, optimizer: optax.GradientTransformation, decay: float = _DECAY
) -> tuple[State, Metrics]:
    """One step on masks [B, S, S] in 0..1; `decay` is that of the codebook's running averages."""
    model = MaskVAE(MaskVAEConfig.from_params(state.params))

    def loss_fn(params: Params):
        output, vectors, codes = model.apply({"params": params}, masks)
        error = jnp.square(vectors - lax.stop_gradient(params["codebook"][codes]))
        loss = jnp.mean(jnp.square(output - (2 * masks - 1))) + _COMMITMENT * jnp.mean(error)
        return loss, (output, vectors, codes, jnp.sum(error, -1))

    (loss, (output, vectors, codes, error)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)

    key, revive_key = jax.random.split(state.key)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    members = jax.nn.one_hot(codes.reshape(-1), len(state.counts))  # [N, K]
    counts = decay * state.counts + (1 - decay) * jnp.sum(members, 0)
    sums = decay * state.sums + (1 - decay) * members.T @ vectors

    # A dead code takes the place of a vector of this batch, sooner one that the codebook fits badly.
    share = len(vectors) / len(counts)
    dead = counts < _DEAD * share
    chosen = vectors[jax.random.categorical(revive_key, jnp.log(error.reshape(-1) + 1e-6), shape=counts.shape)]
    counts = jnp.where(dead, share, counts)
    sums = jnp.where(dead[:, None], share * chosen, sums)
    params = {**params, "codebook": sums / counts[:, None]}

    inside, truth = output > 0, masks > 0.5
    both, either = jnp.sum(inside & truth, (1, 2)), jnp.sum(inside | truth, (1, 2))
    metrics = Metrics(loss, jnp.mean(both / jnp.maximum(either, 1)), jnp.mean(jnp.any(members > 0, 0)))
    return State(params, optimizer_state, counts, sums, key), metrics


def train_mask_vae(
    key: jax.Array,
    masks: Iterator[np.ndarray],
    num_steps: int = 4000,
    learning_rate: float = 1e-3,
    config: MaskVAEConfig | None = None,
    params: Params | None = None,
) -> Params:
    """Trains a mask VQ-VAE, reporting on stderr.

    Args:
      masks: batches [B, 64, 64] in 0..1 (bool or number), one shape throughout, each mask cropped to its box as
        `tasks.segmentation.crop_mask` does; `num_steps` of them.
      params: parameters to go on with; most codes keep their meaning then.

    Returns:
      Parameters of `models.mask_vae`.
    """
    optimizer = make_optimizer(num_steps, learning_rate)
    state = init_state(key, config or MaskVAEConfig(), optimizer, params)
    decay = _DECAY if params is None else _SLOW_DECAY
    step_fn = jax.jit(lambda state, batch: train_step(state, batch, optimizer, decay), donate_argnums=0)
    start = time.monotonic()
    for step in range(1, num_steps + 1):
        batch = np.asarray(next(masks, None), np.float32)
        if batch.shape[1:] != (MASK_SIZE, MASK_SIZE):
            raise DataError(f"mask batch {step} has shape {batch.shape}: give {num_steps} batches [B, 64, 64]")
        state, metrics = step_fn(state, batch)
        if step % _LOG_EVERY == 0 or step == num_steps:
            speed = step / (time.monotonic() - start)
            print(
                f"mask VAE {step}/{num_steps}  loss {metrics.loss:.4f}  IoU {metrics.iou:.3f}  "
                f"codes in use {metrics.used:.0%}  {speed:.1f} steps/s",
                file=sys.stderr,
                flush=True,
            )
    return state.params
