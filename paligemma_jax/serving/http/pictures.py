"""Pictures of requests: out of data URIs and, where that is allowed, of URLs; checked before they are decoded."""

import functools
import io
from collections.abc import Callable

from PIL import Image

from paligemma_jax.errors import DamagedImageError, ImageError
from paligemma_jax.processing import fetch
from paligemma_jax.processing.decode import decode, has_heif
from paligemma_jax.serving.http import guarded_fetch
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.settings import HttpSettings

_KINDS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")  # of PIL's, for what strangers send
_LEAST_SIDE = 2  # pixels
_WHOLE = 'send it as "data:image/png;base64,..."'


def load(
    url: str, param: str, settings: HttpSettings, fetch_url: Callable[..., bytes] = guarded_fetch.fetch
) -> Image.Image:
    """The upright RGB picture of a data URI or URL; blocks while it fetches and decodes.

    Args:
      param: the field that it stands in, for messages, which hold neither the picture nor what a decoder says.

    Raises:
      ApiError: 400.
    """
    try:
        return _decoded(_content(url, settings, fetch_url), settings.max_pixels)
    except DamagedImageError:
        raise _refused("the picture is damaged or truncated: encode it again", param) from None
    except ImageError as error:
        raise _refused(str(error), param) from None


def _content(url: str, settings: HttpSettings, fetch_url: Callable[..., bytes]) -> bytes:
    start = url[:8].lower()
    if start.startswith("data:"):
        try:
            return fetch.fetch(url)
        except ImageError:
            raise ImageError(f"the picture is no base64 data URI: {_WHOLE}") from None
    if not start.startswith(("http://", "https://")):
        raise ImageError(f"the picture is no data URI, and nothing else is read: {_WHOLE}")
    if not settings.image_hosts:
        raise ImageError(f"this server fetches no pictures: {_WHOLE}")
    return fetch_url(url, settings.image_hosts)


def _decoded(content: bytes, max_pixels: int) -> Image.Image:
    picture = decode(io.BytesIO(content), "the picture", max_pixels, _kinds())
    if min(picture.size) < _LEAST_SIDE:
        raise ImageError(f"the picture is {picture.width} x {picture.height}: send one of at least 2 x 2 pixels")
    return picture


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Those that this installation reads."""
    Image.init()
    has_heif()
    return tuple(kind for kind in _KINDS if kind in Image.OPEN)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "invalid_image")
