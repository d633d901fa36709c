"""The process that serves the page: uvicorn on a socket that is bound already, and nothing from elsewhere."""

import asyncio
import logging
import secrets
import socket
from types import FrameType
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paligemma_jax.errors import ConfigError, one_line
from paligemma_jax.serving.http.security import is_own_host
from paligemma_jax.serving.web import look

MAX_UPLOAD = 32 * 2**20  # bytes
_LAST_WORDS_S = 1  # for responses that are complete to be sent; streams of events never end by themselves
_POLICY = (  # what the browser enforces: the page loads and calls nothing but itself
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """ASGI middleware: a policy for browsers on every response, and no other names than this machine's own.

    Args:
      own_host_only: refuse requests by other host names, of web pages whose name was pointed at this machine.
    """

    def __init__(self, app: ASGIApp, own_host_only: bool):
        self._app, self._own_host_only = app, own_host_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._own_host_only and not is_own_host(Headers(scope=scope).get("host", "")):
            await PlainTextResponse("call this page by localhost or 127.0.0.1", 403)(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = _POLICY
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        await self._app(scope, receive, sending)


def make_app(page: gr.Blocks, example: str, own_host_only: bool) -> ASGIApp:
    """The application of a page.

    Args:
      example: path of the example picture, which visitors may see.
    """
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[example],
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=look.theme(),
        css=look.CSS,
    )
    return Guard(app, own_host_only)


def share(port: int) -> str:
    """A public address, through Gradio's own servers, that leads here; ConfigError when there is none to be had."""
    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        raise ConfigError(f"share=True is not possible: {one_line(error)}; serve without it") from None


class _Server(uvicorn.Server):
    """Ends at SIGTERM or Ctrl-C, without the signal afterwards."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # a second one
        self.should_exit = True


def serve(app: ASGIApp, sock: socket.socket) -> None:
    """Answer until the process is told to stop."""
    for name in ("uvicorn", "gradio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    server = _Server(uvicorn.Config(app, timeout_graceful_shutdown=_LAST_WORDS_S, **config))
    asyncio.run(server.serve([sock]))
