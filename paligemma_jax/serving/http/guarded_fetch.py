"""Pictures from a few named hosts: what they redirect to is checked again, and no address inside a network is asked."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Sequence

from paligemma_jax.errors import ImageError
from paligemma_jax.processing.fetch import percent_encoded

MOST_BYTES = 32 * 2**20
TIMEOUT_S = 10.0
_MOST_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)

Resolve = Callable[[str, int], Sequence[str]]


def fetch(
    url: str,
    hosts: Collection[str],
    resolve: Resolve | None = None,
    is_allowed: Callable[[str], bool] | None = None,
) -> bytes:
    """The bytes behind an http(s) URL whose host, or host:port for other ports than the usual, is one of `hosts`.

    A name is resolved once, all its addresses have to be global, and the connection goes to one of these.

    Args:
      resolve, is_allowed: instead of the system's resolver and `is_global`, for tests.

    Raises:
      ImageError: it may not be fetched or cannot be; the message holds neither addresses nor the server's words.
    """
    deadline = time.monotonic() + TIMEOUT_S
    for _ in range(_MOST_REDIRECTS + 1):
        try:
            answer = _ask(url, hosts, resolve or _resolve, is_allowed or is_global, deadline)
        except (OSError, http.client.HTTPException, ValueError):  # UnicodeError of a host is a ValueError
            raise ImageError("the picture's URL cannot be fetched: send the picture as a data URI") from None
        if isinstance(answer, bytes):
            return answer
        url = urllib.parse.urljoin(url, answer)
    raise ImageError("the picture's URL redirects too often: send the picture as a data URI")


def is_global(address: str) -> bool:
    """Whether an address is one of the public internet's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if inner is not None and not is_global(str(inner)):
        return False
    is_translated = ip.version == 6 and ip in ipaddress.ip_network("64:ff9b::/96")
    return ip.is_global and not ip.is_multicast and not is_translated


def _ask(
    url: str, hosts: Collection[str], resolve: Resolve, is_allowed: Callable[[str], bool], deadline: float
) -> bytes | str:
    """The bytes behind a URL, or where it redirects to."""
    parts = urllib.parse.urlsplit(percent_encoded(url))
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
        raise ImageError("a picture's URL is http(s)://HOST/..., without a user: send the picture as a data URI")
    port = parts.port or _PORTS[scheme]
    name = host if port == _PORTS[scheme] else f"{host}:{port}"
    if name not in hosts:
        raise ImageError("pictures are not fetched from this host: send the picture as a data URI")
    addresses = resolve(host, port)
    if not addresses or not all(map(is_allowed, addresses)):
        raise ImageError("the picture's host is not on the public internet: send the picture as a data URI")
    connection = _connect(scheme, host, port, addresses[0], deadline)
    # A timeout of the socket counts anew for each byte: a server that drips would never be given up.
    timer = threading.Timer(max(deadline - time.monotonic(), 0.01), _hang_up, (connection.sock,))
    timer.daemon = True
    timer.start()
    try:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"User-Agent": "paligemma-jax", "Accept": "image/*"})
        with connection.getresponse() as response:  # closed too: it keeps the socket that `connection` lets go
            if response.status in _REDIRECTS and (target := response.getheader("location")):
                return target
            if response.status != 200:
                raise ImageError("the picture's URL cannot be fetched: send the picture as a data URI")
            content = _content(response)
        if time.monotonic() > deadline:  # a body of unknown length ends where the line is hung up
            raise TimeoutError
        return content
    finally:
        timer.cancel()
        connection.close()


def _connect(scheme: str, host: str, port: int, address: str, deadline: float) -> http.client.HTTPConnection:
    """A connection to an address, for a host: its name is in the request, and in the certificate."""
    left = max(deadline - time.monotonic(), 0.01)
    connection = http.client.HTTPConnection(host, port, timeout=left)
    plain = socket.create_connection((address, port), timeout=left)
    try:
        is_secure = scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if is_secure else plain
    except BaseException:
        plain.close()
        raise
    if is_secure:
        connection.default_port = _PORTS["https"]  # of the Host header
    return connection


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


def _content(response: http.client.HTTPResponse) -> bytes:
    data = bytearray()
    while chunk := response.read1(2**16):
        data += chunk
        if len(data) > MOST_BYTES:
            raise ImageError(f"the picture behind the URL is larger than {MOST_BYTES // 2**20} MiB: make it smaller")
    if response.length:  # that are missing
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _resolve(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
