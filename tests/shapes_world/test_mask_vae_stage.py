import jax
import numpy as np
import pytest

from paligemma_jax.errors import DataError
from paligemma_jax.models import mask_vae
from paligemma_jax.models.mask_vae import MaskVAEConfig
from paligemma_jax.shapes_world.mask_vae_stage import init_state, make_optimizer, train_mask_vae, train_step

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
SMALL = MaskVAEConfig((4, 8, 8, 16), (16, 16, 8, 8, 4), code_width=8, num_codes=16)


def batches(size=16, seed=0):
    """Half planes through the middle, at any angle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64] - 31.5
    while True:
        angle = rng.uniform(0, 2 * np.pi, (size, 1, 1))
        yield np.cos(angle) * x + np.sin(angle) * y > 0


@pytest.mark.slow
def test_loss_falls_and_masks_come_back(capsys):
    def accuracy(params, masks):
        return np.mean((np.asarray(mask_vae.decode(params, mask_vae.encode(params, masks))) > 0) == masks)

    params = train_mask_vae(KEY, batches(), num_steps=100, learning_rate=3e-3, config=SMALL)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("mask VAE 100/100") and len(lines) == 2
    unseen = next(batches(64, seed=1))
    assert accuracy(params, unseen) > 0.8


@pytest.mark.slow
def test_first_step_moves_the_codebook_to_vectors_of_the_batch():
    """Each row becomes one of the batch's vectors, or the mean of the many that it stands for."""
    optimizer = make_optimizer(10, 1e-3)
    state = init_state(KEY, SMALL, optimizer)
    masks = next(batches()).astype(np.float32)
    embed = jax.jit(lambda p: mask_vae.MaskVAE(SMALL).apply({"params": p}, masks, method="embed"))
    vectors = np.asarray(embed(state.params)).reshape(-1, 8)
    codes = np.asarray(mask_vae.encode(state.params, masks)).reshape(-1)
    means = [vectors[codes == code].mean(0) for code in np.unique(codes)]
    state, metrics = jax.jit(lambda s, m: train_step(s, m, optimizer))(state, masks)
    distance = np.abs(np.asarray(state.params["codebook"])[:, None] - np.stack([*vectors, *means])).max(-1)
    assert distance.min(1).max() < 1e-5
    assert metrics.used == len(means) / 16 and 0 <= metrics.iou <= 1


@pytest.mark.slow
def test_training_goes_on_with_codes_that_keep_their_meaning(capsys):
    """After a few more steps the codebook is where it was, but for what was not used."""
    first = train_mask_vae(KEY, batches(), num_steps=20, learning_rate=3e-3, config=SMALL)
    start = np.array(first["codebook"])
    masks = next(batches(64, seed=1)).astype(np.float32)
    codes = np.asarray(mask_vae.encode(first, masks))
    again = train_mask_vae(KEY, batches(seed=2), 4, 1e-4, params=first)
    moved = np.linalg.norm(np.asarray(again["codebook"]) - start, axis=1)
    used = np.unique(codes)
    assert 0 < np.median(moved[used]) < 0.2 * np.linalg.norm(start - start.mean(axis=0), axis=1).mean()
    assert np.mean(np.asarray(mask_vae.encode(again, masks)) == codes) > 0.7


@pytest.mark.parametrize("masks", [[], [np.ones((4, 32, 32))], [np.ones((64, 64))]])
def test_wrong_masks_are_a_clear_error(masks):
    with pytest.raises(DataError, match=r"give 3 batches \[B, 64, 64\]"):
        train_mask_vae(KEY, iter(masks), num_steps=3, config=SMALL)
