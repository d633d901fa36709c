"""Pictures that strangers send: what is read, and what each other thing is told; fetching within bounds."""

import base64
import contextlib
import http.server
import io
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ImageError
from paligemma_jax.serving.http import guarded_fetch, pictures
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.settings import HttpSettings

SETTINGS = HttpSettings("shapes", max_pixels=10_000)
PICTURE = Image.new("RGB", (40, 20), (200, 0, 0))


def encoded(image=PICTURE, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def load(url, settings=SETTINGS, **options):
    return pictures.decoded(pictures.content(url, "image_url", settings, **options), "image_url", settings)


def refused(url, settings=SETTINGS, **options):
    with pytest.raises(ApiError) as caught:
        load(url, settings, **options)
    assert (caught.value.status, caught.value.param) == (400, "image_url")
    return caught.value.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_usual_kinds(kind):
    assert load(uri(encoded(kind=kind))).size == (40, 20)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
    picture = Image.new(mode, (40, 20))
    assert load(uri(encoded(picture, kind))).mode == "RGB"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.replace("data:image/png", "DATA:application/octet-stream"),
        lambda text: text[:50] + "\n" + text[50:],
    ],
)
def test_base64_as_clients_write_it(change):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 41, 3), np.uint8))
    assert load(change(uri(encoded(noise)))).size == (41, 20)


def bomb(width, height):
    """A PNG whose header promises more than it has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"<!doctype html><p>hello", "not a picture"),
        (b"%PDF-1.7\n", "which is not read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "which is not read"),
        (b"PK\x03\x04", "not a picture"),
        (b"P6 40 20 255\n" + b"\0" * 2400, "not a picture"),
        (bytes(range(256)), "not a picture"),
        (encoded()[:60], "damaged"),
        (encoded(kind="JPEG")[:300], "damaged"),
        (encoded(Image.new("RGB", (1, 1))), "1 x 1"),
        (encoded(Image.new("RGB", (1, 900))), "1 x 900"),
        (encoded(Image.new("RGB", (101, 100))), "101 x 100"),
        (bomb(9000, 9000), "9000 x 9000"),
        (bomb(60000, 60000), "too large"),
        (bomb(100, 100), "damaged"),
    ],
)
def test_what_is_no_picture_is_told_so(content, words):
    message = refused(uri(content))
    assert words in message and message.count("\n") == 0
    assert not {"broken data stream", "cannot identify", "BytesIO", "Traceback"} & set(message.split(" ("))
    assert base64.b64encode(content).decode()[:40] not in message or not content


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "../x.png", "ftp://a/b.png", "shapes.png", "", "gopher://x", "data"]
)
def test_nothing_else_is_read(url):
    assert "data URI" in refused(url)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,###", "data:,", "data:image/png;base64,A"]
)
def test_data_uris_that_are_none(url):
    message = refused(url)
    assert "base64" in message or "empty" in message


def test_nothing_is_fetched_by_default():
    assert "fetches no pictures" in refused("http://example.org/x.png", fetch_url=None)


# Fetching


@pytest.fixture(scope="module")
def web():
    """web.port, web.seen and web.answers: a server on this machine, (status, headers, body) by path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, self.headers["Host"]))
            status, headers, body = self.server.answers.get(self.path, (404, {}, b"no"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *args: None  # clients that hang up
        server.seen, server.answers, server.port = [], {}, server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetch(web):
    """fetch(path, host="pictures.example", resolved="127.0.0.1"): with a resolver that knows this name only."""
    web.seen.clear()

    def ask(path, host="pictures.example", addresses=("127.0.0.1",), allowed=("127.0.0.1",)):
        asked = []

        def resolve(name, port):
            asked.append(name)
            return addresses

        hosts = (f"pictures.example:{web.port}",)
        content = guarded_fetch.fetch(f"http://{host}:{web.port}{path}", hosts, resolve, lambda ip: ip in allowed)
        assert asked == [host] * len(asked)
        return content

    return ask


def test_a_listed_host_is_asked_by_its_name(web, fetch):
    web.answers = {"/a.png?x=1": (200, {}, encoded())}
    assert fetch("/a.png?x=1") == encoded()
    assert web.seen == [("/a.png?x=1", f"pictures.example:{web.port}")]


def test_redirects_are_followed_within_the_list(web, fetch):
    web.answers = {"/a": (302, {"Location": "/b"}, b""), "/b": (200, {}, b"x"), "/c": (301, {"Location": "/c"}, b"")}
    assert fetch("/a") == b"x"
    with pytest.raises(ImageError, match="redirects too often"):
        fetch("/c")


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/", "http://other.example/", "file:///etc/passwd", "//other.example/"]
)
def test_redirects_elsewhere_are_not(web, fetch, target):
    web.answers = {"/a": (302, {"Location": target}, b"")}
    with pytest.raises(ImageError, match="data URI"):
        fetch("/a")
    assert len(web.seen) == 1


@pytest.mark.parametrize("path", ["/missing", "/error"])
def test_what_cannot_be_fetched_tells_no_details(web, fetch, path):
    web.answers = {"/error": (500, {}, b"secret")}
    with pytest.raises(ImageError, match="cannot be fetched") as caught:
        fetch(path)
    assert not {"404", "500", "127.0.0.1", "secret"} & set(str(caught.value).replace(":", " ").split())


def test_any_private_address_of_a_host_refuses_it(fetch, web):
    for addresses in (("127.0.0.1", "10.0.0.1"), ("10.0.0.1",), ()):
        with pytest.raises(ImageError, match="not on the public internet"):
            fetch("/a", addresses=addresses)
    assert not web.seen


def test_the_name_is_resolved_once(web):
    """A name that changes its address after the check is not asked for again."""
    web.answers, answers = {"/a": (200, {}, b"x")}, iter([("127.0.0.1",)])
    url, hosts = f"http://pictures.example:{web.port}/a", (f"pictures.example:{web.port}",)
    assert guarded_fetch.fetch(url, hosts, lambda host, port: next(answers), lambda ip: True) == b"x"


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pass@pictures.example/",
        "http://pictures.example@evil.example/",
        "http://evil.example/?pictures.example",
        "http://pictures.example.evil.example/",
        "http://pictures.example:22/",
        "http:///x",
        "http://[::1]/",
        "http://pictures.example:99999/",
    ],
)
def test_other_hosts_ports_and_users(url):
    with pytest.raises(ImageError, match="data URI"):
        guarded_fetch.fetch(url, ("pictures.example",), lambda host, port: pytest.fail("was resolved"))


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_a_server_that_drips_is_given_up(monkeypatch, sent):
    monkeypatch.setattr(guarded_fetch, "TIMEOUT_S", 0.3)
    over = threading.Event()

    def drip(listener):
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(sent)
            while not over.wait(0.02):
                client.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        host = f"pictures.example:{listener.getsockname()[1]}"
        try:
            content = guarded_fetch.fetch(f"http://{host}/", (host,), lambda *_: ("127.0.0.1",), lambda ip: True)
        except ImageError as error:
            content = str(error)
        finally:
            over.set()
    assert "cannot be fetched" in content


def test_a_body_that_breaks_off_is_no_picture(web, fetch):
    web.answers = {"/a": (200, {"Content-Length": "100"}, b"abc")}
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch("/a")


def test_large_files_are_not_read_to_their_end(web, fetch, monkeypatch):
    monkeypatch.setattr(guarded_fetch, "MOST_BYTES", 2**20)
    web.answers = {"/a": (200, {}, b"x" * 2**22)}
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        fetch("/a")


@pytest.mark.parametrize(
    "address, expected",
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "192.168.1.1", "172.16.0.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::")),
        *((address, False) for address in ("fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "ff02::1")),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_global_addresses(address, expected):
    assert guarded_fetch.is_global(address) is expected
