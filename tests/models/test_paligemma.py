"""The whole network against its formulas in float64 numpy, and the sizes of the released variants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax.checkpoints import expected_shapes
from paligemma_jax.config import VARIANTS
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.siglip import SigLIP
from tests.formulas import Formulas

PARAMETERS = {  # at 224, 448 and 896 pixels, with 257152 rows
    "paligemma-3b": (2923335408, 2924220144, 2927759088),
    "paligemma2-3b": (3032094960, 3032979696, 3036518640),
    "paligemma2-10b": (9662409456, 9663294192, 9666833136),
    "paligemma2-28b": (27650192112, 27651076848, 27654615792),
}


def test_logits_follow_the_formulas(config, params):
    """A ragged, padded batch: a picture of its own, a shared one, both at once."""
    rng = np.random.default_rng(1)
    num_tokens, side = config.vision.num_tokens, config.vision.image_size
    pixels = rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    rows = [([0], 3, 9), ([1], 6, 2), ([1, 0], 2, 5)]  # pictures, prefix, suffix
    width = 24
    tokens = np.full((len(rows), width), config.pad_token_id, np.int32)
    image_slots = np.full((len(rows), width), -1, np.int32)
    prefix_length, length = np.zeros((2, len(rows)), np.int32)
    for i, (pictures, prefix, suffix) in enumerate(rows):
        slots = np.concatenate([picture * num_tokens + np.arange(num_tokens) for picture in pictures])
        prefix_length[i] = len(slots) + prefix
        length[i] = prefix_length[i] + suffix
        tokens[i, : length[i]] = rng.integers(0, config.image_token_id, length[i])
        tokens[i, : len(slots)] = config.image_token_id
        image_slots[i, : len(slots)] = slots
    arrays = (pixels, tokens, image_slots, prefix_length, length)
    logits = jax.jit(PaliGemma(config).apply)({"params": params}, *arrays)

    formulas = Formulas(config, params)
    for i, (pictures, _, _) in enumerate(rows):
        text = tokens[i, len(pictures) * num_tokens : length[i]]
        expected = formulas([pixels[picture] for picture in pictures], text, prefix_length[i])
        assert expected.std() > 0.3, "logits this even would hide a mistake"
        np.testing.assert_allclose(logits[i, : length[i]], expected, atol=1e-4, rtol=0)


@functools.cache
def _shapes(module: type, config) -> dict[str, tuple[int, ...]]:
    """What `init` would create, abstractly."""
    vision = config if module is SigLIP else config.vision
    inputs = [jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)]
    if module is PaliGemma:
        inputs += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 2), (1, 2), (1,), (1,))]
    variables = jax.eval_shape(module(config).init, jax.random.key(0), *inputs)
    return {path: array.shape for path, array in flatten_dict(variables["params"], sep="/").items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "3b-224" in name else pytest.mark.slow) for name in VARIANTS]
)
def test_released_variants_have_their_parameters(name):
    """Only the image encoder depends on the resolution, so each decoder is traced once."""
    decoder, size = name.rsplit("-", 1)
    text = dataclasses.replace(VARIANTS[name].text, vocab_size=257152)
    config = dataclasses.replace(VARIANTS[name], text=text)
    base = dataclasses.replace(VARIANTS[f"{decoder}-224"], text=text)
    vision = {f"vision_tower/{path}": shape for path, shape in _shapes(SigLIP, config.vision).items()}
    shapes = _shapes(PaliGemma, base) | vision
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[decoder][(224, 448, 896).index(int(size))]
    assert shapes == expected_shapes(config)
