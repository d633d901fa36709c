"""Pictures out of addresses: http(s) URLs, which are downloaded, and data URIs, which hold the picture (RFC 2397)."""

import base64
import binascii
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from paligemma_jax.errors import ImageError, one_line, shortened

MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT_S = 20.0

_SHOWN = 60  # characters of a data URI
_NOT_ENCODED = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]")


def is_url(text: str) -> bool:
    """Whether a name of a picture is an address to fetch it from."""
    return text.lower().startswith(("http://", "https://", "data:"))


def label(name: str) -> str:
    """What a picture of this path or address is called: a data URI is cut to a few words."""
    return shortened(one_line(name), _SHOWN) if name.lower().startswith("data:") else name


def stem(url: str) -> str:
    """The name of an address's file without suffix, "picture" for a data URI."""
    if url.lower().startswith("data:"):
        return "picture"
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
    return name.rpartition(".")[0] or name


def fetch(url: str) -> bytes:
    """The bytes behind an address.

    Raises:
        ImageError: it cannot be fetched, is too large, or is no data URI.
    """
    return _data(url) if url.lower().startswith("data:") else _download(url)


def percent_encoded(url: str) -> str:
    """A URL as servers want it: blanks, non-ASCII letters and lone percent signs encoded, a host's letters by IDNA.

    What is encoded already stays.

    Raises:
        ValueError: it has no possible host.
    """
    parts = urllib.parse.urlsplit(url.strip())
    user, at, host = parts.netloc.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode("ascii")
    user, *rest = (
        _NOT_ENCODED.sub(lambda match: urllib.parse.quote(match[0], safe=""), part) for part in (user, *parts[2:])
    )
    return urllib.parse.urlunsplit((parts.scheme, f"{user}{at}{host}", *rest))


def _data(uri: str) -> bytes:
    header, comma, text = uri.partition(",")
    if not comma:
        raise ImageError(f"{label(uri)} has no comma, which a picture follows in data:image/png;base64,...")
    content = urllib.parse.unquote_to_bytes(text)
    if not header.rstrip().lower().endswith(";base64"):
        return content
    letters = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{label(uri)} is no base64 after its comma: encode the picture again") from None


def _download(url: str) -> bytes:
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    data = bytearray()
    try:
        request = urllib.request.Request(percent_encoded(url), headers={"User-Agent": "paligemma-jax"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
            while chunk := response.read1(2**16):  # the socket's timeout alone never stops a server that drips
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    limit = MAX_DOWNLOAD_BYTES // 2**20
                    raise ImageError(f"{url} is larger than {limit} MiB: download it and make it smaller")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        with error:
            raise ImageError(f"{url} answered {error.code} {error.reason}: check the address") from None
    except TimeoutError:
        raise ImageError(f"{url} took more than {DOWNLOAD_TIMEOUT_S:g} s: try again or download it first") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # UnicodeError of a host is a ValueError
        reason = getattr(error, "reason", error)
        raise ImageError(f"{url} cannot be fetched: {one_line(reason)}; check address and network") from None
    return bytes(data)
