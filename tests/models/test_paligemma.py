"""The whole network against its formulas written again in float64 numpy, and the sizes of the released variants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paligemma_jax.checkpoints import expected_shapes
from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.siglip import SigLIP

PARAMETERS = {  # at 224, 448 and 896 pixels, with 257152 rows
    "paligemma-3b": (2923335408, 2924220144, 2927759088),
    "paligemma2-3b": (3032094960, 3032979696, 3036518640),
    "paligemma2-10b": (9662409456, 9663294192, 9666833136),
    "paligemma2-28b": (27650192112, 27651076848, 27654615792),
}


class Formulas:
    """A slow PaliGemma for one unpadded row: no batch, no cache, a loop over heads and queries, float64."""

    def __init__(self, config: PaliGemmaConfig, params: dict):
        self.config = config
        self.params = {path: np.asarray(array, np.float64) for path, array in flatten_dict(params, sep="/").items()}

    def __call__(self, pictures: list[np.ndarray], tokens: np.ndarray, prefix_length: int) -> np.ndarray:
        """Pictures [S, S, 3] and text ids [T], both without padding; prefix_length counts soft tokens too."""
        text = self.config.text
        table = self.params["language_model/embed_tokens/weight"]
        soft = [self.linear("multi_modal_projector/linear", self.encode(picture)) for picture in pictures]
        x = np.concatenate([*soft, table[tokens] * math.sqrt(text.width)])
        for i in range(text.num_layers):
            x = self.decoder_layer(f"language_model/layers_{i}", i, x, prefix_length)
        return cap(self.rms_norm("language_model/norm", x) @ table.T, text.final_softcap)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.params[f"{name}/weight"].T + self.params.get(f"{name}/bias", 0.0)

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.config.vision.layer_norm_eps)
        return y * self.params[f"{name}/weight"] + self.params[f"{name}/bias"]

    def rms_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.text.rms_norm_eps)
        return y * (1.0 + self.params[f"{name}/weight"])

    def encode(self, picture: np.ndarray) -> np.ndarray:
        vision = self.config.vision
        size, grid = vision.patch_size, vision.image_size // vision.patch_size
        kernel, bias = (self.params[f"vision_tower/patch_embedding/{leaf}"] for leaf in ("weight", "bias"))
        x = np.zeros((grid * grid, vision.width))
        for row in range(grid):
            for column in range(grid):
                patch = picture[row * size :, column * size :][:size, :size]
                x[row * grid + column] = np.einsum("yxc,dcyx->d", patch, kernel) + bias
        x += self.params["vision_tower/position_embedding/weight"]
        everything = np.ones((len(x), len(x)), bool)
        for i in range(vision.num_layers):
            name = f"vision_tower/layers_{i}"
            y = self.layer_norm(f"{name}/layer_norm1", x)
            q, k, v = (self.heads(f"{name}/self_attn/{part}_proj", y, vision.num_heads) for part in "qkv")
            mixed = attention(q / math.sqrt(vision.head_dim), k, v, everything, None)
            x = x + self.linear(f"{name}/self_attn/out_proj", mixed)
            y = self.linear(f"{name}/mlp/fc1", self.layer_norm(f"{name}/layer_norm2", x))
            x = x + self.linear(f"{name}/mlp/fc2", gelu(y))
        return self.layer_norm("vision_tower/post_layernorm", x)

    def heads(self, name: str, x: np.ndarray, count: int) -> np.ndarray:
        return self.linear(name, x).reshape(len(x), count, -1)

    def decoder_layer(self, name: str, index: int, x: np.ndarray, prefix_length: int) -> np.ndarray:
        text = self.config.text
        mask = np.zeros((len(x), len(x)), bool)
        window = text.sliding_window if index % 2 == 0 and text.sliding_window else len(x)
        for query in range(len(x)):
            if query < prefix_length:
                mask[query, :prefix_length] = True
            else:
                mask[query, max(0, query - window + 1) : query + 1] = True
        y = self.rms_norm(f"{name}/pre_attention_norm", x)
        q = rotate(self.heads(f"{name}/self_attn/q_proj", y, text.num_heads), text.rope_theta)
        k = rotate(self.heads(f"{name}/self_attn/k_proj", y, text.num_kv_heads), text.rope_theta)
        v = self.heads(f"{name}/self_attn/v_proj", y, text.num_kv_heads)
        y = self.linear(
            f"{name}/self_attn/o_proj", attention(q / math.sqrt(text.query_scalar), k, v, mask, text.attn_softcap)
        )
        x = x + (self.rms_norm(f"{name}/post_attention_norm", y) if text.version == 2 else y)
        y = self.rms_norm(f"{name}/pre_ffw_norm", x)
        y = gelu(self.linear(f"{name}/mlp/gate_proj", y)) * self.linear(f"{name}/mlp/up_proj", y)
        y = self.linear(f"{name}/mlp/down_proj", y)
        return x + (self.rms_norm(f"{name}/post_ffw_norm", y) if text.version == 2 else y)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def cap(x: np.ndarray, limit: float | None) -> np.ndarray:
    return x if limit is None else limit * np.tanh(x / limit)


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Heads [T, N, H]: the pair (h, h + H / 2) as a complex number, turned by position * theta^(-2h / H)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(len(x))[:, None] * theta ** (-2.0 * np.arange(half) / x.shape[-1]))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, limit: float | None) -> np.ndarray:
    """q [T, N, H], k and v [T, K, H], mask [T, T]: [T, N * H]; query head n uses key head n // (N / K)."""
    outputs = []
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = np.where(mask, cap(q[:, head] @ k[:, shared].T, limit), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
    return np.concatenate(outputs, -1)


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
