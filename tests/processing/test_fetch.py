"""Pictures by URL and data URI."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time
import urllib.parse

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


RAW = {  # whole answers, some of which break off or hold what a terminal obeys
    "/three": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
    "/chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc",
    "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "/escape": b"HTTP/1.1 404 \x1b[31mred\x1b]0;title\x07\r\n\r\n",
    "/loop": b"HTTP/1.1 302 Found\r\nLocation: /loop\r\nContent-Length: 0\r\n\r\n",
    "/away": b"HTTP/1.1 302 \x1b[2J\r\nLocation: file:///\x1b[31m\r\nContent-Length: 0\r\n\r\n",
    "/status": b"\x1b[31mred\r\n\r\n",
    "/long": b"HTTP/1.1 500 " + b"long " * 1000 + b"\r\n\r\n",
    "/nothing": b"HTTP/1.1 503\r\n\r\n",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in RAW:
            self.wfile.write(RAW[self.path])
            return
        if self.path == "/drip":
            with contextlib.suppress(ConnectionError):
                for letter in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100:
                    self.wfile.write(bytes([letter]))
                    time.sleep(0.01)
            return
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
def pages():
    """Status and body of each path of `site`."""
    return {
        "/a.png": (200, PNG),
        "/short.png": (200, PNG),
        "/slow": (200, b""),
        "/page": (200, b"<html>"),
        "/empty": (200, b""),
        "/busy": (503, b""),
    }


@pytest.fixture
def site(pages):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.pages = pages
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
        "short.png": "broke off after 1000 bytes: try again",
        "three": "broke off after 3 bytes",
        "chunk": "broke off",
        "chunks": "broke off",
    }.items():
        assert_one_line_error(f"{site}/{page}", f"{site}/{page}", word)


def test_url_size_limit(site, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 1000)
    assert_one_line_error(f"{site}/a.png", "is larger than")


def test_url_time_limit(site, monkeypatch):
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT_S", 0.1)
    for page in ("slow", "drip"):  # of the contents, of the headers
        start = time.monotonic()
        assert_one_line_error(f"{site}/{page}", "took more than 0.1 s")
        assert time.monotonic() - start < 0.5


def test_time_limit_of_a_name_that_is_looked_up(monkeypatch):
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(0.3) or [])
    assert_one_line_error("http://example.org/a.png", "took more than 0.05 s")


@pytest.mark.parametrize(
    "page, words",
    [
        ("escape", r"answered '404 \x1b[31mred\x1b]0;title\x07'"),
        ("loop", "answered 302"),
        ("away", "answered"),
        ("status", r"\x1b[31mred"),
        ("long", "answered 500 long"),
        ("nothing", "answered 503: check"),
    ],
)
def test_what_servers_say_is_harmless(site, page, words):
    with pytest.raises(ImageError) as error:
        load_image(f"{site}/{page}")
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert words in str(error.value)


@pytest.mark.parametrize(
    "user", ["user:secret", "secret", "u@ser:secret", "user:secret\u2100", ":secret", "user:sec:ret"]
)
def test_urls_with_a_password_are_refused_without_it(user):
    url = f"https://{user}@example.org:8080/a@b.png"
    with pytest.raises(ImageError, match=r"^https://\.\.\.@example.org:8080/a@b.png holds a user") as error:
        load_image(url)
    assert "secret" not in str(error.value) + fetch.label(url) and "sec:" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://", "http://[bad/a.png", "http://a b/c.png"])
def test_unreachable_url(url):
    assert_one_line_error(url, "cannot be fetched")


@pytest.mark.parametrize(
    "url, wire",
    [
        ("https://example.org/a.png", "https://example.org/a.png"),
        ("https://example.org/a b.png", "https://example.org/a%20b.png"),
        ("https://example.org/a%20b.png", "https://example.org/a%20b.png"),
        ("https://example.org/a%20b c.png", "https://example.org/a%20b%20c.png"),
        ("https://example.org/Straße/日.png ", "https://example.org/Stra%C3%9Fe/%E6%97%A5.png"),
        ("https://example.org/100%.png", "https://example.org/100%25.png"),
        ("https://example.org/100%zz.png", "https://example.org/100%25zz.png"),
        (
            "https://example.org/a.png?q=rot & grün&sig=a%2Fb+c==",
            "https://example.org/a.png?q=rot%20&%20gr%C3%BCn&sig=a%2Fb+c==",
        ),
        (
            "http://bücher.example:8080/a;b,c@d!$'()*.png",
            "http://xn--bcher-kva.example:8080/a;b,c@d!$'()*.png",
        ),
        ("https://example.org/a[1]{2}|^`.png", "https://example.org/a[1]%7B2%7D%7C%5E%60.png"),
    ],
)
def test_urls_are_percent_encoded_once(url, wire):
    assert fetch.percent_encoded(url) == wire
    assert fetch.percent_encoded(wire) == wire


@pytest.mark.parametrize("name", ["a b.png", "a%20b.png", "Straße.png", "日本.png", "100%.png", "a+b.png"])
def test_urls_with_odd_letters_are_fetched(site, pages, name):
    path = f"/{urllib.parse.quote(urllib.parse.unquote(name), safe='+')}"
    pages[path] = (200, PNG)
    assert_same(load_image(f"{site}/{name}"), RGB)


BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/PNG;name=a.png;BASE64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:text/plain;base64,{BASE64}",  # the picture itself says what it is
        f"data:image/png;base64,{urllib.parse.quote(BASE64, safe='')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}",
        "data:image/png;base64,\n" + "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
        f"data:image/png,{urllib.parse.quote(PNG)}",
        f"data:,{urllib.parse.quote(PNG, safe='')}",
    ],
)
def test_data_uri(uri):
    assert_same(load_image(uri), RGB)


@pytest.mark.parametrize(
    "uri, words",
    [
        ("data:image/png;base64", "has no comma"),
        (f"data:image/png;base64;{BASE64}", "has no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:,", "is empty"),
        (f"data:image/png;base64,{BASE64[:-1]}!", "is no base64"),
        (f"data:image/png;base64,{BASE64}A", "is no base64"),
        (f"data:image/png;base64,ä{BASE64}", "is no base64"),
        (f"data:image/png;base64,{BASE64[:2000]}", "damaged or truncated"),
        (f"data:image/png,{BASE64}", "is not a picture"),
        ("data:text/html,%3Ch1%3EHello%3C%2Fh1%3E", "is not a picture"),
        ("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
    ],
)
def test_damaged_data_uri(uri, words):
    assert_one_line_error(uri, "data:", words)


def test_names_of_addresses():
    assert fetch.label("https://example.org/" + "a" * 99) == "https://example.org/" + "a" * 99
    assert fetch.label(f"data:image/png;base64,\n{BASE64}").startswith("data:image/png;base64, ")
    assert len(fetch.label(f"data:image/png;base64,{BASE64}")) == 60
    assert fetch.stem(f"data:image/png;base64,{BASE64}") == "picture"
    assert fetch.stem("https://example.org/a/Stra%C3%9Fe 1.large.png?x=y.gif") == "Straße 1.large"
    assert fetch.stem("https://example.org/photo") == "photo"
