"""The networks' formulas once more in float64 numpy: slow, for one row, and sharing nothing with the package."""

import math
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from paligemma_jax.config import PaliGemmaConfig


class Formulas:
    """A slow PaliGemma for one unpadded row: no batch, no cache, a loop over heads and queries, float64."""

    def __init__(self, config: PaliGemmaConfig, params: dict):
        self.config = config
        self.params = {path: np.asarray(array, np.float64) for path, array in flatten_dict(params, sep="/").items()}

    def __call__(self, pictures: list[np.ndarray], tokens: np.ndarray, prefix_length: int) -> np.ndarray:
        """Logits [T', V] of pictures [S, S, 3] and text ids [T], both without padding.

        T' counts soft tokens too, and so does `prefix_length`.
        """
        hidden, _ = self.inside(pictures, tokens, prefix_length)
        return self.logits(hidden[-1])

    def inside(
        self, pictures: list[np.ndarray], tokens: np.ndarray, prefix_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [L + 1, T', D], before the final norm, and attention probabilities [L, N, T', T']."""
        text = self.config.text
        table = self.params["language_model/embed_tokens/weight"]
        soft = [self.linear("multi_modal_projector/linear", self.encode(picture)) for picture in pictures]
        hidden, attention = [np.concatenate([*soft, table[tokens] * math.sqrt(text.width)])], []
        for i in range(text.num_layers):
            x, weights = self.decoder_layer(f"language_model/layers_{i}", i, hidden[-1], prefix_length)
            hidden.append(x)
            attention.append(weights)
        return np.stack(hidden), np.stack(attention)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states [..., D] of the last layer to logits [..., V]."""
        y = self.rms_norm("language_model/norm", hidden) @ self.params["language_model/embed_tokens/weight"].T
        return cap(y, self.config.text.final_softcap)

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
            mixed, _ = attention(q / math.sqrt(vision.head_dim), k, v, everything, None)
            x = x + self.linear(f"{name}/self_attn/out_proj", mixed)
            y = self.linear(f"{name}/mlp/fc1", self.layer_norm(f"{name}/layer_norm2", x))
            x = x + self.linear(f"{name}/mlp/fc2", gelu(y))
        return self.layer_norm("vision_tower/post_layernorm", x)

    def heads(self, name: str, x: np.ndarray, count: int) -> np.ndarray:
        return self.linear(name, x).reshape(len(x), count, -1)

    def decoder_layer(self, name: str, index: int, x: np.ndarray, prefix_length: int) -> tuple[np.ndarray, np.ndarray]:
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
        mixed, weights = attention(q / math.sqrt(text.query_scalar), k, v, mask, text.attn_softcap)
        y = self.linear(f"{name}/self_attn/o_proj", mixed)
        x = x + (self.rms_norm(f"{name}/post_attention_norm", y) if text.version == 2 else y)
        y = self.rms_norm(f"{name}/pre_ffw_norm", x)
        y = gelu(self.linear(f"{name}/mlp/gate_proj", y)) * self.linear(f"{name}/mlp/up_proj", y)
        y = self.linear(f"{name}/mlp/down_proj", y)
        return x + (self.rms_norm(f"{name}/post_ffw_norm", y) if text.version == 2 else y), weights


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


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, limit: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """q [T, N, H], k and v [T, K, H], mask [T, T]: what comes of it [T, N * H], and the probabilities [N, T, T].

    Query head n uses key head n // (N / K).
    """
    outputs, probabilities = [], []
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = np.where(mask, cap(q[:, head] @ k[:, shared].T, limit), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities.append(weights / weights.sum(-1, keepdims=True))
        outputs.append(probabilities[-1] @ v[:, shared])
    return np.concatenate(outputs, -1), np.stack(probabilities)


class MaskFormulas:
    """A slow mask VQ-VAE for one mask, from the arrays of its file: torch's names and axes, a loop over every pixel."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def embed(self, mask: np.ndarray) -> np.ndarray:
        """Mask [64, 64] in 0..1 to vectors [4, 4, E]."""
        x = 2.0 * (mask[..., None] - 0.5)
        for i in (0, 2, 4, 6):
            x = np.maximum(self.convolve(f"encoder.{i}", x, stride=2, padding=1), 0.0)
        for i in (8, 9):
            x = self.residual(f"encoder.{i}.net", x)
        return self.convolve("encoder.10", x)

    def encode(self, mask: np.ndarray) -> np.ndarray:
        """Mask [64, 64] to the 16 nearest rows of the codebook, row by row."""
        vectors = self.embed(mask).reshape(16, -1)
        distances = [((self.arrays["_vq_vae._embedding"] - vector) ** 2).sum(-1) for vector in vectors]
        return np.argmin(distances, -1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """16 codes to a mask [64, 64]."""
        x = self.arrays["_vq_vae._embedding"][codes].reshape(4, 4, -1)
        x = np.maximum(self.convolve("decoder.0", x), 0.0)
        for i in (2, 3):
            x = self.residual(f"decoder.{i}.net", x)
        for i in (4, 6, 8, 10):
            x = np.maximum(self.transposed(f"decoder.{i}", x), 0.0)
        return self.convolve("decoder.12", x)[..., 0]

    def residual(self, name: str, x: np.ndarray) -> np.ndarray:
        y = np.maximum(self.convolve(f"{name}.0", x, padding=1), 0.0)
        y = np.maximum(self.convolve(f"{name}.2", y, padding=1), 0.0)
        return x + self.convolve(f"{name}.4", y)

    def convolve(self, name: str, x: np.ndarray, stride: int = 1, padding: int = 0) -> np.ndarray:
        """x [H, W, C], weight [out, C, size, size]."""
        weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        size, x = weight.shape[-1], np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
        height, width = ((side - size) // stride + 1 for side in x.shape[:2])
        out = np.zeros((height, width, len(weight)))
        for i in range(height):
            for j in range(width):
                seen = x[i * stride : i * stride + size, j * stride : j * stride + size]
                out[i, j] = np.einsum("hwc,ochw->o", seen, weight) + bias
        return out

    def transposed(self, name: str, x: np.ndarray) -> np.ndarray:
        """x [H, W, C], weight [C, out, 4, 4]: every pixel paints 4 x 4, two steps apart; a rim of one is cut off."""
        weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        height, width = x.shape[:2]
        out = np.zeros((2 * height + 2, 2 * width + 2, weight.shape[1]))
        for i in range(height):
            for j in range(width):
                out[2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("c,cohw->hwo", x[i, j], weight)
        return out[1:-1, 1:-1] + bias
