"""What a server allows, and where it listens; plain values."""

import dataclasses
import ipaddress

from paligemma_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """Of one server.

    model_name: what clients call the model.
    host, port: where it listens; port 0 takes a free one.
    keys: one of them must come with every request but those for /health and /ready; () asks for none.
    max_body_bytes, body_timeout_s: of a request's body, and for sending it.
    request_timeout_s: from submitting a request to the end of its answer.
    max_pixels: of a picture, by its header.
    max_images, max_new_tokens: of a request; those of the engine.
    max_n: answers to one request.
    requests_per_minute: of one client; 0 is without limit.
    image_hosts: hosts, or host:port, that pictures are fetched from; () fetches none.
    cors_origins: web pages of other origins that may call, such as https://example.org.
    trusted_proxies: addresses, with commas, of proxies whose X-Forwarded-For is believed.
    drain_s: for running requests to finish after SIGTERM.
    seed: of requests that bring none.
    loc_scale: the location that means the far edge of a picture.

    Raises:
      ConfigError: values that contradict each other, or an open server without a key.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 30.0
    request_timeout_s: float = 120.0
    max_pixels: int = 50_000_000
    max_images: int = 4
    max_new_tokens: int = 512
    max_n: int = 8
    requests_per_minute: int = 0
    image_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: str = ""
    drain_s: float = 30.0
    seed: int = 0
    loc_scale: int = 1023

    def __post_init__(self):
        for name in ("max_body_bytes", "body_timeout_s", "request_timeout_s", "max_pixels", "max_n"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} is not possible: give a number above 0")
        for name in ("requests_per_minute", "drain_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} is not possible: give a number of at least 0")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is not possible: give a number from 0 to 65535")
        if not is_loopback(self.host) and not self.keys:
            raise ConfigError(
                f"host={self.host!r} lets other machines in: set api_key or api_key_file too, or keep host=127.0.0.1"
            )
        if "*" in self.cors_origins:
            raise ConfigError("cors_origins='*' would let any web page in: name the origins, as https://example.org")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
