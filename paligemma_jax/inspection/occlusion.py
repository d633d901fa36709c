"""Occlusion maps: how much the log-probability of an answer drops when a square of patches is hidden.

After Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (arXiv 1311.2901).

Axes: N patches, G = sqrt(N) of a side, D decoder width, S squares, n answer tokens with <eos>, P side in pixels.
"""

import math

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax.api import PaliGemma
from paligemma_jax.errors import ConfigError
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.processing.image import ImageSource, load_image

WAYS = ("pixels", "tokens")

_MOST_SQUARES = 8  # of a side, unless another size is asked for


def occlusion(
    model: PaliGemma,
    image: ImageSource,
    prompt: str,
    answer: str,
    size: int | None = None,
    way: str = "pixels",
    batch_size: int = 16,
    progress: bool = True,
) -> np.ndarray:
    """Drop in the log-probability of each answer token when each patch is hidden: f32 [n, N], in nats.

    Summed over the tokens it is the answer's. Positive: the token depends on what is hidden; negative: it is likelier
    without. It takes one forward pass for each square.

    Args:
      image, prompt, answer: as for `model.trace`, one image.
      size: side of a square in patches; None leaves about eight squares to a side.
      way: "pixels" fills a square with the image's mean colour and encodes the image again, so that nothing of it is
        left in other patches; "tokens" replaces its soft tokens by the mean one, which is faster, but the encoder has
        already mixed what it saw into other patches.
      batch_size: squares that are hidden at once.
      progress: show a bar on stderr.

    Raises:
      ConfigError: a size or a way that is not possible.
    """
    if way not in WAYS:
        raise ConfigError(f"way={way!r} of hiding is not possible: give {' or '.join(WAYS)}")
    hidden = squares(grid_side(model.config.vision.num_tokens), size)
    occlude = _pixel_occluder(model, image) if way == "pixels" else _token_occluder(model, image)
    nothing = np.zeros((1, hidden.shape[1]), bool)

    def score(masks: np.ndarray) -> np.ndarray:
        count = len(masks)
        return np.stack(model.score(None, [prompt] * count, [answer] * count, image_embeddings=occlude(masks)))

    whole = score(nothing)
    drops = []
    with tqdm(total=len(hidden), desc="hiding", unit="square", disable=not progress) as bar:
        for start in range(0, len(hidden), batch_size):
            masks = hidden[start : start + batch_size]
            drops.append(whole - score(masks))
            bar.update(len(masks))
    return np.concatenate(drops).T @ hidden.astype(np.float32)


def squares(side: int, size: int | None = None) -> np.ndarray:
    """Squares of patches that tile a grid: bool [S, side * side], smaller at the right and lower edges."""
    size = size or math.ceil(side / _MOST_SQUARES)
    if not 1 <= size <= side:
        raise ConfigError(f"a square of {size} patches is not possible: give 1 to {side}, as many as a side has")
    blocks = np.arange(side) // size
    row, column = np.repeat(blocks, side), np.tile(blocks, side)
    number = row * (blocks[-1] + 1) + column
    return number == np.arange(number[-1] + 1)[:, None]


def _pixel_occluder(model: PaliGemma, image: ImageSource):
    """A function from masks bool [S, N] to soft tokens [S, N, D] of the image with these patches in its mean colour."""
    settings = model.processor.image_settings
    resample = Image.Resampling[settings.resample.upper()]
    pixels = np.asarray(load_image(image).resize((settings.size, settings.size), resample))  # to P x P
    mean = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    side, patch = settings.size // model.config.vision.patch_size, model.config.vision.patch_size

    def occlude(masks: np.ndarray):
        areas = masks.reshape(-1, side, side).repeat(patch, axis=1).repeat(patch, axis=2)
        return model.embed_image([np.where(area[..., None], mean, pixels) for area in areas])

    return occlude


def _token_occluder(model: PaliGemma, image: ImageSource):
    """A function from masks bool [S, N] to soft tokens [S, N, D] of the image, the mean one where a mask is."""
    soft_tokens = np.asarray(model.embed_image(load_image(image)), np.float32)
    mean = soft_tokens.mean(axis=1, keepdims=True)
    return lambda masks: np.where(masks[:, :, None], mean, soft_tokens)
