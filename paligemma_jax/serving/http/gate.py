"""What every request passes: its id, host, key, rate, and an answer in OpenAI's form whatever goes wrong."""

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paligemma_jax.serving.http import logs
from paligemma_jax.serving.http.bodies import Json
from paligemma_jax.serving.http.errors import ApiError, as_api_error
from paligemma_jax.serving.http.security import Keys, RateLimit, is_own_host
from paligemma_jax.serving.http.service import Service
from paligemma_jax.serving.http.settings import is_loopback

_OPEN = ("/health", "/ready")
_POLLED = (*_OPEN, "/metrics")  # every few seconds: not worth a line each
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_UNKNOWN = "unknown"  # route of what leads nowhere: not its path, of which there are endlessly many


class Gate:
    """ASGI middleware in front of all routes."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._keys = Keys(service.settings.keys)
        self._rate = RateLimit(service.settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status, began = 0, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        counts = scope["method"] not in ("GET", "HEAD")
        self._service.running += counts
        try:
            self._admit(scope, headers, counts)
            await self._app(scope, receive, sending)
        except Exception as error:
            known = as_api_error(error)
            if known.status >= 500 and not isinstance(error, ApiError):
                trace = logs.trace_of(error.__traceback__)
                logs.log("failed", request_id=request_id, error=type(error).__name__, trace=trace)
            if status:
                raise  # the connection is closed: half a response is no good one
            await Json(known.body(), known.status, known.headers())(scope, receive, sending)
        finally:
            self._service.running -= counts
            self._log(scope, request_id, status or 499, time.monotonic() - began)

    def _admit(self, scope: Scope, headers: Headers, counts: bool) -> None:
        """Whether a request may be answered; ApiError."""
        settings = self._service.settings
        address = scope["client"][0] if scope.get("client") else ""
        key = None
        if scope["path"] not in _OPEN:
            if self._keys and (key := self._keys.number_of(headers)) is None:
                raise ApiError(401, "send a key of this server, as authorization: Bearer KEY", code="invalid_api_key")
            if not self._keys and is_loopback(settings.host) and not is_own_host(headers.get("host", "")):
                # A web page whose name was pointed at this machine.
                raise ApiError(403, "without api_key the server is called by localhost or 127.0.0.1 only")
        client = f"{key}:{address}"
        scope.setdefault("state", {})["client"] = client
        if counts and self._service.draining:
            raise ApiError(503, "the server is stopping: ask another one", code="shutting_down", retry_after=5)
        if counts and (wait := self._rate.wait_s(client)):
            text = f"more than {settings.requests_per_minute} requests a minute: wait {wait} s"
            raise ApiError(429, text, code="rate_limit_exceeded", retry_after=wait)

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", _UNKNOWN)
        self._service.metrics.responded(route, status)
        if route in _POLLED and status != 500:
            return
        client = scope["client"][0] if scope.get("client") else None
        fields = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 1)}
        logs.log("request", request_id=request_id, client=client, **fields)
