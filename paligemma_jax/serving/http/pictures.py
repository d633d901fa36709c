"""Pictures of requests: out of data URIs and, where that is allowed, of URLs; checked before they are decoded."""

from collections.abc import Callable

from PIL import Image

from paligemma_jax.errors import ImageError
from paligemma_jax.processing import fetch
from paligemma_jax.serving.http import guarded_fetch
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.settings import HttpSettings
from paligemma_jax.serving.uploads import read_upload

_FETCHED = ("http://", "https://")
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
        return read_upload(file, settings.max_pixels)
    except ImageError as error:
        raise _refused(str(error), param) from None


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


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "invalid_image")
