"""Pictures that strangers send: checked by their header before anything is decoded."""

import functools
import io

from PIL import Image

from paligemma_jax.errors import DamagedImageError, ImageError
from paligemma_jax.processing.decode import decode, has_heif

MAX_PIXELS = 50_000_000

_KINDS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")  # of PIL's, for what strangers send
_LEAST_SIDE = 2  # pixels


def read_upload(file: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture in a file.

    Raises:
      ImageError: another kind of file, a damaged one, one with more than `max_pixels` or next to none. The message
        holds nothing that a decoder says.
    """
    try:
        picture = decode(io.BytesIO(file), "the picture", max_pixels, _kinds())
    except DamagedImageError:
        raise ImageError("the picture is damaged or truncated: encode it again") from None
    if min(picture.size) < _LEAST_SIDE:
        size = f"{picture.width} x {picture.height}"
        raise ImageError(f"the picture is {size}: send one of at least {_LEAST_SIDE} x {_LEAST_SIDE} pixels")
    return picture


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Those that this installation reads."""
    Image.init()
    has_heif()
    return tuple(kind for kind in _KINDS if kind in Image.OPEN)
