"""Pictures out of addresses: http(s) URLs, which are downloaded, and data URIs, which hold the picture (RFC 2397)."""

import base64
import binascii
import http.client
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future

from paligemma_jax.errors import ImageError, one_line, printable, shortened

MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT_S = 20.0

_SHOWN = 60  # characters of a data URI
_SAID = 160  # characters of what a server says
_USER = re.compile(r"^(https?://)[^/?#]*@", re.IGNORECASE)  # and a password
_NOT_ENCODED = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]")


def is_url(text: str) -> bool:
    """Whether a name of a picture is an address to fetch it from."""
    return text.lower().startswith(("http://", "https://", "data:"))


def label(name: str) -> str:
    """What a picture of this path or address is called: a data URI is cut to a few words, a password left out."""
    is_data = name.lower().startswith("data:")
    return shortened(one_line(name), _SHOWN) if is_data else _USER.sub(r"\1...@", name, count=1)


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
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    rest = (_NOT_ENCODED.sub(lambda match: urllib.parse.quote(match[0], safe=""), part) for part in parts[2:])
    return urllib.parse.urlunsplit((parts.scheme, host, *rest))


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
    name = printable(label(url))
    if _USER.match(url):
        raise ImageError(f"{name} holds a user or password, which are not sent: leave them out or download it first")
    answer: Future[bytes] = Future()
    # A socket's limit is for each read, and a name's look-up has none: one for all is kept by not waiting longer.
    threading.Thread(target=_answer, args=(url, name, answer), name="download", daemon=True).start()
    try:
        return answer.result(DOWNLOAD_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            said = _said(f"{error.code} {error.reason}")
            raise ImageError(f"{name} answered {said}: check the address") from None
    except http.client.IncompleteRead as error:
        raise ImageError(f"{name} broke off after {len(error.partial)} bytes: try again") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # UnicodeError of a host is a ValueError
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            limit = f"{DOWNLOAD_TIMEOUT_S:g} s"
            raise ImageError(f"{name} took more than {limit}: try again or download it first") from None
        raise ImageError(f"{name} cannot be fetched: {_said(reason)}; check address and network") from None


def _answer(url: str, name: str, answer: Future[bytes]) -> None:
    try:
        answer.set_result(_content(url, name, time.monotonic() + DOWNLOAD_TIMEOUT_S))
    except BaseException as error:  # whatever it is, it is raised where the answer is waited for
        answer.set_exception(error)


def _content(url: str, name: str, deadline: float) -> bytes:
    data = bytearray()
    request = urllib.request.Request(percent_encoded(url), headers={"User-Agent": "paligemma-jax"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
        length = response.length  # None where the server does not tell
        while chunk := response.read1(2**16):
            data += chunk
            if len(data) > MAX_DOWNLOAD_BYTES:
                limit = MAX_DOWNLOAD_BYTES // 2**20
                raise ImageError(f"{name} is larger than {limit} MiB: download it and make it smaller")
            if time.monotonic() > deadline:
                raise TimeoutError
    if length is not None and len(data) < length:
        raise http.client.IncompleteRead(bytes(data), length - len(data))
    return bytes(data)


def _said(text: object) -> str:
    """What a server or the network says, harmless to a terminal."""
    return shortened(printable(one_line(text)), _SAID)
