"""Answers that are sent while they grow: server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paligemma_jax.serving.http import logs
from paligemma_jax.serving.http.bodies import to_json
from paligemma_jax.serving.http.errors import as_api_error

KEEPALIVE_S = 15.0
DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
      events: the texts of whole events. What goes wrong becomes the last one, in OpenAI's form.
      leave: called when all is sent or the client has left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # of nginx: pass on at once
        super().__init__(_kept_alive(_with_errors(events)), headers=headers)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


def data(value: dict[str, Any], event: str | None = None) -> str:
    """One event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {to_json(value).encode('utf-8', 'replace').decode()}\n\n"


async def _with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    except Exception as error:
        known = as_api_error(error)
        if known.status >= 500:
            logs.log("failed", error=type(error).__name__, trace=logs.trace_of(error.__traceback__))
        yield data(known.body())


async def _kept_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events, and a comment whenever there is none for some time, so that no proxy hangs up."""
    task: asyncio.Future[str] | None = None
    try:
        while True:
            task = task or asyncio.ensure_future(anext(events))
            await asyncio.wait({task}, timeout=KEEPALIVE_S)
            if not task.done():
                yield ": keepalive\n\n"
                continue
            try:
                event = task.result()
            except StopAsyncIteration:
                return
            task = None
            yield event
    finally:
        if task is not None and not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await task
