"""Steps of the distillation beside torch in float64: loss, gradients, AdamW, and the plateau schedule."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax.patch_vit import weights
from paligemma_jax.patch_vit.distill import distill_loss, trained
from paligemma_jax.patch_vit.plateau import Recipe, after_validation, make_optimizer
from paligemma_jax.patch_vit.student import PatchViT
from paligemma_jax.training.step import init_state, make_step
from tests.patch_vit.small import VARIANTS, small_student
from tests.patch_vit.test_student import state_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

VALIDATION = [2.0, 1.5, 1.4999, 1.4995, 1.4993, 1.2, 1.2, 1.2, 1.2, 1.2, 1.19, 1.3, 1.3]


def keyed(params) -> dict[str, np.ndarray]:
    return {weights.student_key(path): np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_steps_are_those_of_torch_in_float64(variant):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_patch_vit import TorchPatchViT
    from benchmarks.torch_patch_vit import distill_loss as their_loss

    student = small_student(variant)
    cfg, recipe = student.config, Recipe(learning_rate=3e-3)
    sizes = (cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.num_layers, cfg.num_heads, cfg.mlp_dim)
    theirs = TorchPatchViT(*sizes, cfg.masked, cfg.same_norm).double()
    theirs.load_state_dict({key: torch.tensor(value.astype(np.float64)) for key, value in state_of(student).items()})
    named = {name: p for name, p in theirs.named_parameters() if name != "scale" and not name.startswith("ln_post")}
    adamw = torch.optim.AdamW(named.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adamw, "min", 0.5, 1, threshold=1e-3, min_lr=1e-6)

    loss = functools.partial(distill_loss, PatchViT(cfg), "float32")
    optimizer = make_optimizer(recipe, trained)
    state, step = init_state(jax.tree.map(np.array, student.params), optimizer), make_step(loss, optimizer)
    rng, counted = np.random.default_rng(0), {}
    for number, value in enumerate(VALIDATION):
        pixels = rng.normal(size=(4, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
        targets = rng.normal(size=(4, cfg.embed_dim)).astype(np.float32)
        adamw.zero_grad()
        pooled, _, _ = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2).astype(np.float64)))
        expected = their_loss(pooled, torch.tensor(targets.astype(np.float64)))
        expected.backward()
        batch = {"pixels": pixels, "targets": targets}
        if number == 0:
            _, gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
            for key, gradient in keyed(gradients).items():
                if key in named:
                    np.testing.assert_allclose(gradient, named[key].grad, atol=1e-5, err_msg=key)
                elif key != "scale":  # its gradient is 0 but for rounding
                    assert not gradient.any(), key
        adamw.step()
        plateau.step(value)
        state, metrics = step(state, batch)
        schedule = after_validation(recipe, state.opt_state, value)
        state = dataclasses.replace(state, opt_state=schedule)
        np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=1e-5)
        np.testing.assert_allclose(schedule.learning_rate, adamw.param_groups[0]["lr"], rtol=1e-6)
        for key, value in keyed(state.params).items():
            wanted = theirs.state_dict()[key].numpy()
            # What the loss does not depend on, such as the keys' bias: Adam makes steps of the roundings of 0.
            counts = np.abs(named[key].grad.numpy()) > 1e-9 if key in named else np.ones(value.shape, bool)
            counted[key] = counted.get(key, True) & counts
            tolerance = 1e-5 if number == 0 else 1e-4
            np.testing.assert_allclose(value[counted[key]], wanted[counted[key]], atol=tolerance, err_msg=key)
            assert counted[key].mean() > 0.6, key
