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
_FETCHED = ("http://", "https://")
_LEAST_SIDE = 2  # pixels
_WHOLE = 'send it as "data:image/png;base64,..."'


def content(
    url: str, param: str, settings: HttpSettings, fetch_url: Callable[..., bytes] = guarded_fetch.fetch
) -> bytes:
    """The file of a picture that a data URI or URL names; blocks while it fetches.

    Args:
      param: the field that it stands in, for messages, which hold neither the picture nor an address.

    Raises:
      ApiError: 400.
    """
    try:
        return _content(url, settings, fetch_url)
    except ImageError as error:
        raise _refused(str(error), param) from None


def decoded(file: bytes, param: str, settings: HttpSettings) -> Image.Image:
    """The upright RGB picture in a file; errors as of `content`, without what a decoder says."""
    try:
        picture = decode(io.BytesIO(file), "the picture", settings.max_pixels, _kinds())
    except DamagedImageError:
        raise _refused("the picture is damaged or truncated: encode it again", param) from None
    except ImageError as error:
        raise _refused(str(error), param) from None
    if min(picture.size) < _LEAST_SIDE:
        size = f"{picture.width} x {picture.height}"
        raise _refused(f"the picture is {size}: send one of at least {_LEAST_SIDE} x {_LEAST_SIDE} pixels", param)
    return picture


def is_fetched(url: str) -> bool:
    """Whether a picture comes over the network."""
    return url[:8].lower().startswith(_FETCHED)


def _content(url: str, settings: HttpSettings, fetch_url: Callable[..., bytes]) -> bytes:
    if url[:5].lower() == "data:":
        try:
            return fetch.fetch(url)
        except ImageError:
            raise ImageError(f"the picture is no base64 data URI: {_WHOLE}") from None
    if not is_fetched(url):
        raise ImageError(f"the picture is no data URI, and nothing else is read: {_WHOLE}")
    if not settings.image_hosts:
        raise ImageError(f"this server fetches no pictures: {_WHOLE}")
    return fetch_url(url, settings.image_hosts)


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Those that this installation reads."""
    Image.init()
    has_heif()
    return tuple(kind for kind in _KINDS if kind in Image.OPEN)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "invalid_image")
