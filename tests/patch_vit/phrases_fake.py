"""A student and a teacher that can be foreseen: a patch's embedding is its mean colour, a text's a named colour."""

import types

import numpy as np
from PIL import Image

from paligemma_jax.patch_vit.preprocess import PixelSettings

SIDE, PATCH = 4, 8
PIXELS = SIDE * PATCH
COLORS = {"red": (4, 0, 0), "green": (0, 4, 0), "blue": (0, 0, 4)}


class FakeStudent:
    """Embeds a patch as its mean colour, -1..1; the picture as the mean of its patches."""

    def __init__(self):
        self.config = types.SimpleNamespace(image_size=PIXELS, grid=SIDE, embed_dim=3)
        self.batches: list[int] = []

    settings = PixelSettings(PIXELS, mean=(0.5,) * 3, std=(0.5,) * 3)

    def preprocess(self, images):
        return self.settings(images)

    def embed_patches(self, pixels):
        self.batches.append(len(pixels))
        patches = np.asarray(pixels).reshape(-1, SIDE, PATCH, SIDE, PATCH, 3).mean((2, 4))
        return patches.reshape(len(pixels), SIDE * SIDE, 3)

    def embed(self, pixels):
        patches = self.embed_patches(pixels)
        shares = np.exp(patches.sum(-1))
        shares /= shares.sum(-1, keepdims=True)
        return np.einsum("bnd,bn->bd", patches, shares), shares


class FakeClip:
    """Embeds a text as the sum of the colours that it names; a picture as its mean colour."""

    def __init__(self):
        self.config = types.SimpleNamespace(projection_dim=3)

    settings, preprocess = FakeStudent.settings, FakeStudent.preprocess

    def embed_text(self, texts):
        named = [[np.array(color) for name, color in COLORS.items() if name in text] for text in texts]
        return np.stack([np.sum(colors, axis=0) if colors else np.ones(3) for colors in named]).astype(np.float32)

    def embed_image(self, pixels):
        return np.asarray(pixels).mean((1, 2)) + 1e-3

    def cls_attention(self, pixels):
        parts = np.asarray(pixels)[:, :30, :30].reshape(-1, 3, 10, 3, 10, 3)
        brightness = np.exp(parts.mean((2, 4, 5))).reshape(-1, 9)
        return 0.9 * brightness / brightness.sum(-1, keepdims=True)  # the rest is the class token's own


def squares(*places, size=(PIXELS, PIXELS), ground=(90, 90, 90)):
    """A grey picture with rectangles ((x0, y0, x1, y1), colour)."""
    image = Image.new("RGB", size, ground)
    for box, color in places:
        image.paste(color, box)
    return image
