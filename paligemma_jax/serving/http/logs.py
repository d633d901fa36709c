"""A JSON object per line on stderr: no pictures, no prompts, no keys."""

import contextlib
import datetime
import json
import logging
import sys
from typing import Any


def log(event: str, **fields: Any) -> None:
    """Write a line; a log that cannot be written, on a full disk, stops nothing."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event} | fields, default=str)
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class Handler(logging.Handler):
    """What libraries log, as such lines."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a message whose arguments do not fit
            trace = {"trace": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}
            log("library", level=record.levelname.lower(), logger=record.name, message=record.getMessage(), **trace)
