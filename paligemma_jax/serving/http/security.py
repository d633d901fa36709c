"""Who may call, and how often."""

import base64
import binascii
import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from paligemma_jax.errors import ConfigError
from paligemma_jax.files import expanded, read_lines
from paligemma_jax.serving.http.settings import is_loopback

_MOST_CLIENTS = 10_000  # whose last requests are remembered
_BASIC = "basic "


def read_keys(api_key: str, api_key_file: str) -> tuple[str, ...]:
    """The keys of a config: one, or a file with one per line.

    Raises:
      ConfigError: the file cannot be read or is empty, or a key is not plain ASCII.
    """
    keys = [api_key] if api_key else []
    if api_key_file:
        path = expanded(api_key_file)
        try:
            keys += [line.strip() for line in read_lines(path) if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"api_key_file {path} cannot be read: give a text file with a key per line") from None
        if not keys:
            raise ConfigError(f"api_key_file {path} is empty: write a key on each line")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ConfigError("an api_key has blanks or letters other than ASCII, which headers cannot hold: use others")
    return tuple(keys)


class Keys:
    """The keys of a server, compared in constant time."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def number_of(self, headers: Mapping[str, str]) -> int | None:
        """Which key came with a request, None for none of them.

        OpenAI's clients send it as a bearer token, moondream's as X-Moondream-Auth, Label Studio as a password.
        """
        value = headers.get("authorization", "")
        scheme, _, token = value.partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-moondream-auth", "")
        if value.lower().startswith(_BASIC):
            given = _password(value[len(_BASIC) :])
        digest, found = _digest(given), None
        for number, known in enumerate(self._digests):  # all of them, whichever fits
            if hmac.compare_digest(digest, known):
                found = number
        return found


class RateLimit:
    """So many requests per minute and client; unused ones add up to a minute's."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._per_minute = per_minute
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: requests left, when

    def wait_s(self, client: str) -> int:
        """Count a request; 0, or the seconds after which the client may try again."""
        if not self._per_minute:
            return 0
        now, rate = self._clock(), self._per_minute / 60
        left, since = self._left.pop(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * rate)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        while len(self._left) > _MOST_CLIENTS:
            self._left.popitem(last=False)
        return 0 if left >= 1 else max(1, math.ceil((1 - left) / rate))


def is_own_host(header: str) -> bool:
    """Whether a Host header names this machine by a name that no other machine's DNS can claim."""
    host = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    return is_loopback(host.strip("[]").lower())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
