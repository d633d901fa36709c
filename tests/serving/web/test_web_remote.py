"""A server elsewhere: what it streams are the events of an answer."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paligemma_jax.errors import Cancelled, ConfigError, ServingError
from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.web.remote import Remote
from paligemma_jax.serving.web.snippets import Source
from tests.serving.web.conftest import STAR, output, question


@contextlib.contextmanager
def serving(respond):
    """A server whose POSTs `respond` answers; the address, and the bodies and keys that came."""
    came = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "tiny"}]}')

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            came.append((self.path, body, self.headers.get("authorization")))
            with contextlib.suppress(OSError):
                respond(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", came
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def events(*said):
    """A respond that streams these."""

    def respond(handler):
        handler.send_response(200)
        handler.end_headers()
        for event in said:
            handler.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())

    return respond


def piece(text, reason=None):
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


@contextlib.contextmanager
def remote(address, key=""):
    backend = Remote(address, key)
    try:
        yield backend
    finally:
        backend.close()


def test_pieces_and_the_end():
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    said = events(piece("a "), piece("cat"), piece(None, "length"), usage, "[DONE]")
    with serving(said) as (address, came), remote(address, "secret") as backend:
        *pieces, end = backend.served().ask(question("caption en", max_new_tokens=7), "me")
    assert [event.text for event in pieces] == ["a ", "cat"]
    assert isinstance(end, Finished) and end.output.text == "a cat" and end.reason == "length"
    assert end.output.timing.new_tokens == 7
    [(path, body, key)] = came
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["stream"] and body["max_tokens"] == 7
    picture, text = body["messages"][0]["content"]
    assert text["text"] == "caption en" and picture["image_url"]["url"].startswith("data:image/png;base64,")


def refuse(status, content):
    def respond(handler):
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(content)

    return respond


@pytest.mark.parametrize(
    "respond, says",
    [
        (refuse(401, b'{"error": {"message": "send a key"}}'), "the server says: send a key"),
        (refuse(502, b"<html>"), "status 502"),
        (events({"error": {"message": "took too long"}}), "took too long"),
        (events("no json"), "answers strangely"),
    ],
)
def test_what_goes_wrong_is_one_line(respond, says):
    with serving(respond) as (address, _), remote(address) as backend, pytest.raises(ServingError, match=says) as error:
        backend.ask(question(), "me").result()
    assert "\n" not in str(error.value)


def test_a_server_that_is_not_there_is_said():
    with remote("http://127.0.0.1:9") as backend:
        with pytest.raises(ServingError, match="does not answer"):
            backend.ask(question(), "me").result()
        deadline = time.monotonic() + 10
        while backend.status().state != "failed":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "does not answer" in backend.status().news


def test_a_request_that_is_stopped_ends():
    done = threading.Event()

    def respond(handler):
        events(piece("a"))(handler)
        assert done.wait(10)
        events(piece("b"))(handler)

    with serving(respond) as (address, _), remote(address) as backend:
        answer = backend.ask(question(), "me")
        heard = iter(answer)
        assert next(heard).text == "a"
        answer.cancel()
        done.set()
        with pytest.raises(Cancelled):
            next(heard)


def test_status_names_the_model_and_boxes_come_without_scores():
    with serving(events()) as (address, _), remote(address) as backend:
        deadline = time.monotonic() + 10
        while backend.status().state != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert backend.status().name == f"tiny at {address}"
        [item], _ = backend.objects(output(f"{STAR} star"), (10, 10), ("star",))
    assert item.label == "star" and item.score is None
    with pytest.raises(ConfigError):
        backend.load(Source("x"))
    with pytest.raises(ConfigError, match="server='x'"):
        Remote("x")
