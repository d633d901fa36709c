"""The patch ViT's specification in float64 numpy, for one picture and with loops; it shares nothing with the package.

Parameters are those of the original's files, by their names there.
"""

import math

import numpy as np


def patch_vit(
    state: dict[str, np.ndarray], picture: np.ndarray, *, num_heads: int, masked: bool, same_norm: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patch embeddings [N, D], probabilities [N] and the image embedding [D] of one picture [S, S, 3]."""
    state = {key: np.asarray(value, np.float64) for key, value in state.items()}
    kernel = state["conv1.weight"]
    width, _, size, _ = kernel.shape
    grid = len(picture) // size
    x = np.zeros((grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            patch = picture[row * size : (row + 1) * size, column * size : (column + 1) * size]
            x[row * grid + column] = np.einsum("yxc,dcyx->d", patch.astype(np.float64), kernel)
    x = layer_norm(state, "ln_pre", x + state["positional_embedding"])
    additive = mask(grid) if masked else np.zeros((grid * grid, grid * grid))
    layer = 0
    while f"transformer.resblocks.{layer}.ln_1.weight" in state:
        name = f"transformer.resblocks.{layer}"
        x = x + attention(state, f"{name}.attn", layer_norm(state, f"{name}.ln_1", x), additive, num_heads)
        y = linear(state, f"{name}.mlp.c_fc", layer_norm(state, f"{name}.ln_2", x))
        x = x + linear(state, f"{name}.mlp.c_proj", y / (1 + np.exp(-1.702 * y)))
        layer += 1
    per_head = width // num_heads
    embeddings, logits = [], []
    for token in x:
        parts = [token[h * per_head : (h + 1) * per_head] for h in range(num_heads)]
        logits.append(sum(part[-1] for part in parts) / num_heads)
        embeddings.append(np.concatenate([part[:-1] for part in parts]))
    if same_norm:
        length = min(state["scale"][0], 10.0)
        embeddings = [e / math.sqrt((e**2).sum()) * length for e in embeddings]
    probabilities = softmax(np.array(logits))
    return np.array(embeddings), probabilities, sum(p * e for p, e in zip(probabilities, embeddings, strict=True))


def mask(grid: int) -> np.ndarray:
    """0 within Chebyshev distance 1, minus infinity beyond."""
    out = np.full((grid * grid, grid * grid), -np.inf)
    for a in range(grid * grid):
        for b in range(grid * grid):
            if max(abs(a // grid - b // grid), abs(a % grid - b % grid)) <= 1:
                out[a, b] = 0
    return out


def attention(state: dict, name: str, x: np.ndarray, additive: np.ndarray, num_heads: int) -> np.ndarray:
    q, k, v = np.split(x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"], 3, axis=1)
    size = q.shape[1] // num_heads
    out = np.zeros_like(q)
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size) + additive
        out[:, part] = np.stack([softmax(row) for row in scores]) @ v[:, part]
    return linear(state, f"{name}.out_proj", out)


def linear(state: dict, name: str, x: np.ndarray) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state: dict, name: str, x: np.ndarray) -> np.ndarray:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * state[f"{name}.weight"] + state[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
