"""Live comparison with transformers and torch in float32: hidden states and attention of both generations."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import checkpoints
from paligemma_jax.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma_jax.engine import forward, steps
from paligemma_jax.models.layers import RMSNorm

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-4
ROWS = [(1, 5, 9), (2, 3, 4), (1, 9, 1)]  # pictures, prefix, suffix

_VISION = VisionConfig(image_size=42, patch_size=14, width=24, num_layers=2, mlp_dim=40, num_heads=3)
_GEMMA = TextConfig(
    vocab_size=104,
    width=32,
    num_layers=3,
    mlp_dim=48,
    num_heads=4,
    num_kv_heads=1,
    head_dim=12,
    query_scalar=12.0,
    max_positions=128,
)
_GEMMA2 = dataclasses.replace(
    _GEMMA, version=2, num_kv_heads=2, query_scalar=5.0, attn_softcap=1.5, final_softcap=2.0, sliding_window=7
)
GEOMETRIES = {
    name: PaliGemmaConfig(_VISION, text, image_token_id=96) for name, text in (("gemma", _GEMMA), ("gemma2", _GEMMA2))
}


@pytest.fixture(scope="module")
def reference():
    """Our wrapper of transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch_reference

    return torch_reference


@pytest.mark.parametrize("name", GEOMETRIES)
def test_hidden_states_and_attention_are_those_of_transformers(reference, name, tmp_path):
    config = GEOMETRIES[name]
    model = reference.random_model(config)
    model.save_pretrained(tmp_path)
    batch = reference.random_batch(config, ROWS)
    expected_hidden, expected_attention = reference.inside(model, batch)

    _, params = checkpoints.load(tmp_path, "float32", progress=False)
    soft_tokens = steps.run(params, batch.pixels, config=config, method="embed_image")
    inputs = steps.select_rows(batch, soft_tokens, range(len(ROWS)))
    hidden, attention, _ = forward.trace(params, inputs, config=config, num_positions=16)
    norm = RMSNorm(config.text.rms_norm_eps)  # transformers' last hidden states are those after it
    last = norm.apply({"params": params["language_model"]["norm"]}, hidden[-1])
    hidden = np.asarray(jnp.concatenate([hidden[:-1], last[None]]))

    assert expected_hidden.shape == (config.text.num_layers + 1, len(ROWS), batch.tokens.shape[1], config.text.width)
    for row, (start, stop) in enumerate(zip(batch.prefix_length, batch.length, strict=True)):
        np.testing.assert_allclose(hidden[:, row, :stop], expected_hidden[:, row, :stop], atol=TOLERANCE)
        ours = np.asarray(attention)[:, row, :, : stop - start]
        theirs = expected_attention[:, row, :, start - 1 : stop - 1]
        np.testing.assert_allclose(ours[..., :stop], theirs[..., :stop], atol=TOLERANCE)
        assert not ours[..., stop:].any() and theirs.std() > 1e-3
