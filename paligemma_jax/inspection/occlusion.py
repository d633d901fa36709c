"""Which parts of a picture an answer rests on: hide a square of patches, and see how much less likely it gets.

Axes: N patches, G = sqrt(N) of a side, D decoder width, S squares, n answer tokens with <eos>, P side in pixels.
"""

import math

import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax.errors import ConfigError
from paligemma_jax.inspection.embeddings import grid_side
from paligemma_jax.pipeline import PaliGemma
from paligemma_jax.processing.image import ImageSource, load_image

WAYS = ("pixels", "tokens")

_MOST_SQUARES = 8  # of a side, unless another size is asked for


def occlusion(
    model: PaliGemma,
    picture: ImageSource,
    prompt: str,
    answer: str,
    size: int | None = None,
    way: str = "pixels",
    batch_size: int = 16,
    progress: bool = True,
) -> np.ndarray:
    """How much of the log-probability of each answer token goes with each patch: f32 [n, N], in nats.

    Summed over the tokens it is that of the answer. Above 0 the token rests on what is hidden, below 0 it is likelier
    without. The passes are as many as there are squares.

    Args:
      picture, prompt, answer: as for `model.trace`, one picture.
      size: side of a square in patches; None leaves about eight squares to a side.
      way: "pixels" paints a square in the picture's mean colour and encodes the picture anew, so that no other patch
        knows of it either; "tokens" puts the mean soft token there, which is faster, but the encoder has told the other
        patches what it saw.
      batch_size: squares that are hidden at once.
      progress: show a bar on stderr.

    Raises:
      ConfigError: a size or a way that is not possible.
    """
    if way not in WAYS:
        raise ConfigError(f"way={way!r} of hiding is not possible: give {' or '.join(WAYS)}")
    hidden = squares(grid_side(model.config.vision.num_tokens), size)
    paint = _painter(model, picture) if way == "pixels" else _eraser(model, picture)
    nothing = np.zeros((1, hidden.shape[1]), bool)

    def score(masks: np.ndarray) -> np.ndarray:
        count = len(masks)
        return np.stack(model.score(None, [prompt] * count, [answer] * count, image_embeddings=paint(masks)))

    whole = score(nothing)
    drops = []
    with tqdm(total=len(hidden), desc="hiding", unit="square", disable=not progress) as bar:
        for start in range(0, len(hidden), batch_size):
            masks = hidden[start : start + batch_size]
            drops.append(whole - score(masks))
            bar.update(len(masks))
    return np.concatenate(drops).T @ hidden.astype(np.float32)


def squares(side: int, size: int | None = None) -> np.ndarray:
    """Squares of patches that tile a grid: bool [S, side * side], those at the right and lower rim being smaller."""
    size = size or math.ceil(side / _MOST_SQUARES)
    if not 1 <= size <= side:
        raise ConfigError(f"a square of {size} patches is not possible: give 1 to {side}, as many as a side has")
    places = np.arange(side) // size
    row, column = np.repeat(places, side), np.tile(places, side)
    number = row * (places[-1] + 1) + column
    return number == np.arange(number[-1] + 1)[:, None]


def _painter(model: PaliGemma, picture: ImageSource):
    """A function from masks bool [S, N] to soft tokens [S, N, D] of the picture with these patches in one colour."""
    settings = model.processor.image_settings
    resample = Image.Resampling[settings.resample.upper()]
    pixels = np.asarray(load_image(picture).resize((settings.size, settings.size), resample))  # squeezed to P x P
    mean = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    side, patch = settings.size // model.config.vision.patch_size, model.config.vision.patch_size

    def paint(masks: np.ndarray):
        areas = masks.reshape(-1, side, side).repeat(patch, axis=1).repeat(patch, axis=2)
        return model.embed_image([np.where(area[..., None], mean, pixels) for area in areas])

    return paint


def _eraser(model: PaliGemma, picture: ImageSource):
    """A function from masks bool [S, N] to soft tokens [S, N, D] of the picture, the mean one where a mask is."""
    soft_tokens = np.asarray(model.embed_image(load_image(picture)), np.float32)
    mean = soft_tokens.mean(axis=1, keepdims=True)
    return lambda masks: np.where(masks[:, :, None], mean, soft_tokens)
