"""A JSON object per line on stderr: no pictures, no prompts, no keys."""

import contextlib
import datetime
import json
import logging
import sys
import traceback
import types
from typing import Any

_MOST_FRAMES = 6


def log(event: str, **fields: Any) -> None:
    """Write a line; a log that cannot be written, on a full disk, stops nothing."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event} | fields, default=str)
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def trace_of(place: types.TracebackType | None) -> str:
    """Where something went wrong; not the message, which may hold a prompt."""
    return "".join(traceback.format_tb(place)[-_MOST_FRAMES:])


class Handler(logging.Handler):
    """What libraries log, as such lines."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a message whose arguments do not fit
            kind, _, place = record.exc_info or (None, None, None)
            trace = {"error": kind.__name__, "trace": trace_of(place)} if kind else {}
            log("library", level=record.levelname.lower(), logger=record.name, message=record.getMessage(), **trace)
