"""A server at a real socket: clients that leave, dawdle or send too much, and its end under load."""

import http.client
import json
import resource
import runpy
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, EngineFailed
from paligemma_jax.serving.http.server import listen
from paligemma_jax.serving.http.settings import HttpSettings

CLIENT = Path(__file__).resolve().parents[3] / "docs" / "deploy" / "client.py"
HEADERS = "Host: localhost\r\nContent-Type: application/json\r\n"


def post(port, body, path="/v1/chat/completions", timeout=10):
    """(status, headers, content) of a request in a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def send(port, body, path="/v1/chat/completions"):
    """A socket on which a request was sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\n{HEADERS}Content-Length: {len(content)}\r\n\r\n"
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(head.encode() + content)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_the_answers_of_a_client_that_leaves_are_cancelled(live, helpers, stream):
    here = live()
    here.engine.held = True
    sock = send(here.port, helpers.chat(stream=stream, n=2))
    helpers.until(lambda: len(here.engine.answers) == 2)
    if stream:
        seen = b""
        while b'"content":"a"' not in seen:
            seen += sock.recv(4096)
    sock.close()
    assert all(answer.cancelled.wait(5) for answer in here.engine.answers)
    helpers.until(lambda: not here.service.running)
    here.engine.held = False
    assert post(here.port, helpers.chat())[0] == 200


def test_a_stream_is_sent_while_it_grows(live, helpers):
    here = live()
    here.engine.held = True
    with send(here.port, helpers.chat(stream=True)) as sock:
        seen = b""
        while b'"content":"a"' not in seen:
            seen += sock.recv(4096)
        assert b"[DONE]" not in seen
        here.engine.answers[0].release()
        while b"[DONE]" not in seen:
            seen += sock.recv(4096)


def test_the_client_of_the_documentation(live, helpers, tmp_path):
    here = live(keys=("secret",))
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    picture, make = str(tmp_path / "a.png"), runpy.run_path(str(CLIENT))["Client"]
    client = make(f"http://127.0.0.1:{here.port}/", "secret")
    assert client.ask("caption en", picture, seed=5) == client.caption(picture) == "a red circle"
    assert list(filter(None, client.stream("caption en", picture))) == ["a", " red", " circle"]
    here.engine.say = lambda request: "<loc0000><loc0000><loc1023><loc1023> cat"
    assert client.detect(picture, "cat") == [{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]
    here.engine.say = lambda request: EngineFailed("x")
    with pytest.raises(RuntimeError, match="could not be generated"):
        list(client.stream("caption en", picture))
    with pytest.raises(RuntimeError, match="500: the answer could not"):
        client.caption(picture)
    with pytest.raises(RuntimeError, match="401: send a key"):
        make(f"http://127.0.0.1:{here.port}").caption(picture)


def test_slow_bodies_end(live, helpers):
    here = live(body_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", here.port), timeout=10) as sock:
        sock.sendall(f"POST /v1/detect HTTP/1.1\r\n{HEADERS}Content-Length: 99\r\n\r\n{{".encode())
        began = time.monotonic()
        assert sock.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 3
    assert post(here.port, helpers.chat())[0] == 200


def test_large_bodies_are_told_so_and_not_kept(live, helpers):
    here = live(max_body_bytes=2**16)
    status, _, content = post(here.port, {"image_url": "x" * 2**24}, "/v1/detect")
    assert status == 413 and json.loads(content)["error"]["code"] == "body_too_large"
    assert post(here.port, helpers.chat())[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("is_told", [True, False], ids=["content-length", "chunked"])
def test_100_mb_take_neither_memory_nor_long(live, helpers, is_told):
    """Within 20 s, and with less than 100 MB more at any time, of which 32 are the default limit."""
    here = live()
    chunk, count = b" " * 2**20, 100
    lengths = {"Content-Length": str(count * len(chunk))} if is_told else {}
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", here.port, timeout=30)
    headers = {"content-type": "application/json"} | lengths
    connection.request("POST", "/v1/detect", (chunk for _ in range(count)), headers, encode_chunked=not is_told)
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]["code"] == "body_too_large"
    connection.close()
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert post(here.port, helpers.chat())[0] == 200


@pytest.mark.slow
def test_a_picture_of_many_pixels_does_not_take_long(live, helpers):
    """A PNG of 48 million pixels in 140 kB, just allowed, and one above the limit, which is not decoded."""
    here = live()
    allowed = helpers.data_uri(Image.new("RGB", (8000, 6000)))
    refused = helpers.data_uri(Image.new("RGB", (8000, 7000)))
    for url, status, seconds in ((allowed, 200, 20), (refused, 400, 1)):
        began = time.monotonic()
        assert post(here.port, helpers.chat(url=url), timeout=30)[0] == status
        assert time.monotonic() - began < seconds


def test_garbage_instead_of_http(live, helpers):
    here = live()
    for garbage in (
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", here.port), timeout=10) as sock:
            sock.sendall(garbage)
            assert sock.recv(4096)[:12] in (b"HTTP/1.1 400", b"")
    assert get(here.port, "/health") == 200


def test_running_answers_are_finished_before_the_end_and_new_ones_refused(live, helpers):
    here = live(drain_s=20.0)
    here.engine.held = True
    results = []
    thread = threading.Thread(target=lambda: results.append(post(here.port, helpers.chat())))
    thread.start()
    helpers.until(lambda: here.engine.answers)
    here.server.handle_exit(signal.SIGTERM, None)
    assert get(here.port, "/ready") == 503 and get(here.port, "/health") == 200
    status, headers, content = post(here.port, helpers.chat())
    assert status == 503 and headers["retry-after"] and json.loads(content)["error"]["code"] == "shutting_down"
    here.engine.answers[0].release()
    thread.join(10)
    assert results[0][0] == 200
    here.thread.join(10)
    assert not here.thread.is_alive()


def test_the_end_does_not_wait_for_ever(live, helpers):
    here = live(drain_s=0.2)
    here.engine.held = True
    with send(here.port, helpers.chat(stream=True)):
        helpers.until(lambda: here.engine.answers)
        here.server.handle_exit(signal.SIGTERM, None)
        here.thread.join(5)
        assert not here.thread.is_alive()
    assert here.engine.answers[0].cancelled.wait(1)


def test_a_second_signal_ends_at_once(live, monkeypatch):
    here = live(drain_s=20.0)
    ended = []
    monkeypatch.setattr("paligemma_jax.serving.http.server.os._exit", ended.append)
    here.service.running += 1
    here.server.handle_exit(signal.SIGTERM, None)
    here.server.handle_exit(signal.SIGTERM, None)
    here.service.running -= 1
    assert ended == [128 + signal.SIGTERM]


def test_a_port_that_is_taken_is_one_line():
    with listen(HttpSettings("x", port=0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} is not possible"):
            listen(HttpSettings("x", port=port))
    with pytest.raises(ConfigError, match=r"host=192.0.2.1"):
        listen(HttpSettings("x", host="192.0.2.1", keys=("k",)))
