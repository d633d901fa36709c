"""Random changes of training pictures: the original's, with PIL and numpy."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_RESIZED = 300 / 224  # side before the crop, relative to the input's
_JITTER = 0.4
_GREY, _FLIP, _BLUR, _POSTERIZE, _AUTOCONTRAST = 0.05, 0.1, 0.05, 0.005, 0.001
_POSTERIZE_BITS = 3
_BLUR_SIGMAS = (0.1, 2.0)


def augment(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """An RGB picture to a random one of [size, size].

    It is squeezed to a square of 300 / 224 of that, its brightness, contrast and saturation are multiplied by 0.6 to
    1.4 in a random order, it may become grey, mirrored, blurred, posterized or have its contrast stretched, and a
    square of `size` is cut out of it.
    """
    side = round(size * _RESIZED)
    image = image.resize((side, side), Image.Resampling.BILINEAR)
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for index in rng.permutation(len(kinds)):
        image = kinds[index](image).enhance(rng.uniform(1 - _JITTER, 1 + _JITTER))
    chances = rng.random(5)
    if chances[0] < _GREY:
        image = image.convert("L").convert("RGB")
    if chances[1] < _FLIP:
        image = ImageOps.mirror(image)
    sigma = rng.uniform(*_BLUR_SIGMAS)
    if chances[2] < _BLUR:
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    if chances[3] < _POSTERIZE:
        image = ImageOps.posterize(image, _POSTERIZE_BITS)
    if chances[4] < _AUTOCONTRAST:
        image = ImageOps.autocontrast(image)
    left, top = rng.integers(side - size + 1, size=2).tolist()
    return image.crop((left, top, left + size, top + size))
