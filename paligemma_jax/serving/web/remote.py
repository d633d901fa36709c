"""A running server of this project, asked over its HTTP API; no model is loaded here."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import paligemma_jax as pj
from paligemma_jax.errors import Cancelled, ConfigError, ServingError, UserError, one_line, shortened
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.events import Finished, Piece
from paligemma_jax.serving.web.backend import TIMEOUT_S, Status
from paligemma_jax.serving.web.questions import Question
from paligemma_jax.serving.web.snippets import Source, chat_body
from paligemma_jax.tasks.detection import parse

_LOOK_S = 10.0  # between two looks at a server that is ready
_IMPATIENT_S = 1.0  # at one that is not
_NOTHING = np.zeros(0, np.float32)
_REASONS = {"stop": "eos", "length": "length"}


class Remote:
    """`backend.Backend` and `backend.Served` of a server.

    Args:
      address: http://HOST:PORT.
      key: of the server, if it wants one.
      loc_scale: the location that means the far edge of a picture.
    """

    can_load = False
    model: pj.PaliGemma | None = None
    tokenizer: Tokenizer | None = None

    def __init__(self, address: str, key: str = "", loc_scale: int = 1023):
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"server={address!r} is not possible: give an address, as http://127.0.0.1:8000")
        self._address, self._key = address.rstrip("/"), key
        self.source = Source("", server=self._address, loc_scale=loc_scale, needs_key=bool(key))
        self._status = Status("loading", self._address)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="server-watcher", daemon=True).start()

    def served(self) -> "Remote":
        return self

    def status(self) -> Status:
        return self._status

    def load(self, source: Source) -> None:
        raise ConfigError("the model is that of the server: start the page without one to choose models")

    def close(self) -> bool:
        self._closed.set()
        return True

    def ask(self, question: Question, client: str) -> Answer:
        """See `backend.Served.ask`; the server takes all visitors of the page for one client."""
        cancelled = threading.Event()
        answer = Answer(cancelled.set)
        threading.Thread(target=self._answer, args=(question, answer, cancelled), daemon=True).start()
        return answer

    def objects(
        self, output: pj.Output, size: tuple[int, int], labels: Sequence[str]
    ) -> tuple[list[pj.Detection], list[str]]:
        """Boxes: scores and masks are not in an answer's text."""
        return parse(output.text, size, self.source.loc_scale, labels)

    def _answer(self, question: Question, answer: Answer, cancelled: threading.Event) -> None:
        """The thread of one answer: what the server streams, as events."""
        text, count, reason = "", 0, "eos"
        began = time.monotonic()
        first = None
        try:
            body = chat_body(question) | {"stream": True, "stream_options": {"include_usage": True}}
            for event in self._events("/v1/chat/completions", body):
                if cancelled.is_set():
                    raise Cancelled("the request was cancelled")
                if "error" in event:
                    raise ServingError(f"the server says: {event['error']['message']}")
                for choice in event.get("choices", ()):
                    reason = _REASONS.get(choice.get("finish_reason"), reason)
                    if piece := choice["delta"].get("content"):
                        first = first or time.monotonic()
                        text += piece
                        answer.put(Piece(piece, _NOTHING.astype(np.int32), _NOTHING))
                count = (event.get("usage") or {}).get("completion_tokens", count)
            now = time.monotonic()
            timing = pj.Timing(0.0, 1e3 * ((first or now) - began), None, count)
            output = pj.Output(text, _NOTHING.astype(np.int32), _NOTHING, reason, timing, _NOTHING, _NOTHING)
            answer.put(Finished(output, reason, 0.0, (first or now) - began, now - began))
        except UserError as error:
            answer.put(error)
        except Exception as error:  # what came is none of our forms
            answer.put(ServingError(shortened(f"{self._address} answers strangely: {one_line(error)}")))

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a stream of events says, until it is done or no longer wanted."""
        with self._open(path, json.dumps(body).encode()) as response:
            for line in response:
                said = line.decode().strip()
                if said.startswith("data:") and (event := said.removeprefix("data:").strip()) != "[DONE]":
                    yield json.loads(event)

    def _open(self, path: str, body: bytes | None = None) -> Any:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._address + path, body, headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S if body else _LOOK_S)
        except urllib.error.HTTPError as error:
            with error:
                content = error.read(10_000).decode("utf-8", "replace")
            message = f"status {error.code}"
            with contextlib.suppress(ValueError, KeyError, TypeError):
                message = json.loads(content)["error"]["message"]
            raise ServingError(shortened(f"the server says: {message}")) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServingError(shortened(f"{self._address} does not answer: {one_line(reason)}; start it")) from None

    def _watch(self) -> None:
        """The thread that asks how the server is."""
        while not self._closed.is_set():
            try:
                with self._open("/ready"):
                    pass
                with self._open("/v1/models") as response:
                    name = str(json.load(response)["data"][0]["id"])
                self._status = Status("ready", f"{name} at {self._address}")
            except UserError as error:
                self._status = Status("failed", self._address, str(error), True)
            except Exception as error:
                self._status = Status("failed", self._address, f"no server of this project: {one_line(error)}", True)
            self._closed.wait(_LOOK_S if self._status.state == "ready" else _IMPATIENT_S)
