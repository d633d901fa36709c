"""Pictures by URL and data URI."""

import contextlib
import http.server
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ImageError
from paligemma_jax.processing import fetch
from paligemma_jax.processing.image import load_image

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8))


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


PNG = encoded(RGB, format="PNG")


def assert_one_line_error(source, *words):
    with pytest.raises(ImageError) as error:
        load_image(source)
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    assert all(word in message for word in words), message


def assert_same(image, expected):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = self.server.pages.get(self.path, (404, b""))
        self.send_response(status)
        if self.path != "/slow":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/slow":
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    time.sleep(0.01)
                    self.wfile.write(b"x")
        self.wfile.write(body[: 1000 if self.path == "/short.png" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.pages = {
            "/a.png": (200, PNG),
            "/short.png": (200, PNG),
            "/slow": (200, b""),
            "/page": (200, b"<html>"),
            "/empty": (200, b""),
            "/busy": (503, b""),
        }
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_url(site):
    assert_same(load_image(f"{site}/a.png"), RGB)
    for page, word in {
        "none.png": "answered 404",
        "busy": "answered 503",
        "page": "not a picture",
        "empty": "is empty",
        "short.png": "damaged or truncated",
    }.items():
        assert_one_line_error(f"{site}/{page}", f"{site}/{page}", word)


def test_url_size_limit(site, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 1000)
    assert_one_line_error(f"{site}/a.png", "is larger than")


def test_url_time_limit(site, monkeypatch):
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT_S", 0.1)
    assert_one_line_error(f"{site}/slow", "took more than 0.1 s")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://", "http://[bad/a.png", "http://a b/c.png"])
def test_unreachable_url(url):
    assert_one_line_error(url, "cannot be fetched")
