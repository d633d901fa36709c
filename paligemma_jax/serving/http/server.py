"""The process that listens: uvicorn, with an end that lets running requests finish."""

import asyncio
import logging
import os
import socket
import time
from types import FrameType

import uvicorn

from paligemma_jax.errors import ConfigError
from paligemma_jax.serving.http import logs
from paligemma_jax.serving.http.app import make_app
from paligemma_jax.serving.http.service import Service
from paligemma_jax.serving.http.settings import HttpSettings

_MOST_CONNECTIONS = 1000
_LAST_WORDS_S = 1  # for responses that are complete to be sent


class Server(uvicorn.Server):
    """Stops at SIGTERM or Ctrl-C when all is answered, or after `drain_s`; at a second signal at once.

    Until then it listens, and answers 503 to what is new, /ready among it.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is not None:
            os._exit(128 + sig)
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (not self._service.running or time.monotonic() >= self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(settings: HttpSettings) -> socket.socket:
    """A socket that is bound; ConfigError when the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host.strip("[]"), settings.port))
        sock.listen(_MOST_CONNECTIONS)
    except OSError as error:
        sock.close()
        remedy = "give another host or port"
        where = f"host={settings.host} with port={settings.port}"
        raise ConfigError(f"{where} is not possible: {error.strerror or error}; {remedy}") from None
    return sock


def serve(service: Service, sock: socket.socket) -> None:
    """Answer requests until the process is told to stop."""
    settings = service.settings
    for name in ("uvicorn", "paligemma_jax"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logs.Handler()], False
        logger.setLevel(logging.WARNING)
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS_S,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        lifespan="off",
    )
    asyncio.run(Server(config, service).serve([sock]))
