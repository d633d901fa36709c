"""What every request passes: keys, hosts, rates, bodies, ids, logs; errors have OpenAI's form wherever they arise."""

import json
import logging
import re
import threading
import types

import pytest

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.serving.events import Stats
from paligemma_jax.serving.http import logs
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.security import RateLimit, is_own_host, read_keys
from paligemma_jax.serving.http.service import Service
from paligemma_jax.serving.http.settings import HttpSettings, is_loopback

POSTS = ("chat/completions", "responses", "caption", "query", "detect", "point", "segment", "embed")
ROUTES = [
    *(("POST", f"/v1/{name}") for name in POSTS),
    *(("POST", "/predict"), ("POST", "/setup"), ("GET", "/v1/models"), ("GET", "/v1/models/shapes")),
    *(("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere")),
]
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("method, path", ROUTES)
@pytest.mark.parametrize("value", [None, "Bearer ", "Bearer secre", "Bearer secrets", "secret", "Bearer s\xe9cret"])
def test_every_route_asks_for_the_key(closed, helpers, method, path, value):
    headers = {} if value is None else {"authorization": value.encode("latin-1")}
    response = closed.request(method, path, headers=headers)
    helpers.refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


def test_with_a_key_all_is_open_and_health_needs_none(closed):
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
        assert closed.get(path, headers={"authorization": "bearer secret"}).status_code == 200
    assert closed.get("/health").status_code == 200 and closed.get("/ready").status_code == 200


@pytest.mark.parametrize("path", ["/v1/nowhere", "/nowhere", "/v1/chat/completions/", "/v1/../etc/passwd"])
def test_unknown_paths(client, helpers, path):
    helpers.refused(client.get(path), 404)


def test_other_methods(client, helpers):
    response = client.get("/v1/chat/completions")
    helpers.refused(response, 405)
    assert response.headers["allow"] == "POST"


# Hosts, origins and rates


@pytest.mark.parametrize(
    "host, status", [("localhost:8000", 200), ("[::1]:80", 200), ("127.0.0.1", 200), ("evil.example", 403)]
)
def test_pages_that_point_their_name_here_are_turned_away(client, host, status):
    assert client.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_bodies_that_pages_may_send_unasked_are_refused(client, helpers, kind):
    content = json.dumps(helpers.chat()).encode()
    helpers.refused(client.post("/v1/chat/completions", content=content, headers={"content-type": kind}), 415)


def test_origins(client, client_with, helpers):
    ask = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/models", headers=ask).headers
    open_ = client_with(cors_origins=("https://example.org",), keys=("secret",))
    answer = open_.options("/v1/chat/completions", headers=ask)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"
    other = open_.options("/v1/chat/completions", headers=ask | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_too_many_requests(client_with, helpers):
    client = client_with(requests_per_minute=2)
    assert [client.post("/setup").status_code for _ in range(3)] == [200, 200, 429]
    response = client.post("/v1/chat/completions", json=helpers.chat())
    helpers.refused(response, 429)
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert client.get("/v1/models").status_code == 200


def test_rates_are_of_each_client_and_come_back():
    now = 0.0
    limit = RateLimit(6, lambda: now)
    assert [limit.wait_s("a") for _ in range(7)] == [0] * 6 + [10]
    assert limit.wait_s("b") == 0
    now = 9.0
    assert limit.wait_s("a") == 1
    now = 10.5
    assert [limit.wait_s("a"), limit.wait_s("a")] == [0, 10]
    for number in range(20_000):
        limit.wait_s(str(number))
    assert len(limit._left) <= 10_000


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("127.9.9.9:80", True),
        ("[::1]", True),
        ("localhost.evil.example", False),
        ("", False),
        ("::1", False),
        ("127.0.0.1.nip.io:8000", False),
    ],
)
def test_names_of_this_machine(host, expected):
    assert is_own_host(host) is expected


# Bodies


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"\x00\x01\x02garbage", "no JSON"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b'"x"', "no JSON object"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
        (b"[" * 40 + b"]" * 40, "deep"),
        (b'{"messages":' + b"[" * 40 + b"]" * 40 + b"}", "deep"),
        (b'{"temperature": NaN}', "finite"),
        (b'{"temperature": Infinity}', "finite"),
        (b'{"temperature": -Infinity}', "finite"),
        (b'{"temperature": 1e999}', "finite"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "too long"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/detect", "/predict"])
def test_garbage(client, helpers, path, content, words):
    assert words in helpers.refused(client.post(path, content=content, headers=JSON))


@pytest.mark.parametrize("is_told", [True, False], ids=["content-length", "chunked"])
def test_large_bodies(client_with, helpers, is_told):
    client = client_with(max_body_bytes=10_000)
    content = b"x" * 5000
    body = content * 3 if is_told else iter([content] * 3)
    helpers.refused(client.post("/v1/chat/completions", content=body, headers=JSON), 413)
    assert client.post("/v1/chat/completions", json=helpers.chat()).status_code == 200


def test_lone_surrogates_are_text(client, helpers):
    content = json.dumps(helpers.chat(model="\ud800")).encode()
    helpers.refused(client.post("/v1/chat/completions", content=content, headers=JSON), 404, "model")
    content = json.dumps(helpers.chat("answer en \ud800?")).encode()
    assert client.post("/v1/chat/completions", content=content, headers=JSON).status_code in (200, 400)


# What a server says about itself


def test_ids(client, helpers):
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for strange in ("a b", "x" * 65, '"', ""):
        assert re.fullmatch(
            "[0-9a-f]{32}", client.get("/health", headers={"x-request-id": strange}).headers["x-request-id"]
        )


def test_logs_are_json_without_prompts_pictures_and_keys(client_with, engine, helpers, capsys):
    client = client_with(engine, keys=("secret",))
    engine.say = lambda request: "an answer"
    headers = {"authorization": "Bearer secret", "x-request-id": "id-1"}
    assert (
        client.post("/v1/chat/completions", json=helpers.chat("answer en private?"), headers=headers).status_code == 200
    )
    engine.say = lambda request: RuntimeError("private trouble")
    assert (
        client.post("/v1/chat/completions", json=helpers.chat("answer en private?"), headers=headers).status_code == 500
    )
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["request", "failed", "request"]
    assert (
        lines[0]["route"] == "/v1/chat/completions" and lines[0]["status"] == 200 and lines[0]["request_id"] == "id-1"
    )
    assert (
        lines[1]["error"] == "RuntimeError" and lines[1]["request_id"] == "id-1" and "service.py" in lines[1]["trace"]
    )
    text = json.dumps(lines)
    assert not any(word in text for word in ("private", "secret", "an answer", "base64"))


def test_what_libraries_log_is_json_without_messages_of_errors(capsys):
    logger = logging.Logger("some.library")
    logger.addHandler(logs.Handler())
    try:
        raise RuntimeError("private")
    except RuntimeError:
        logger.exception("it %s", "failed")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["message"], line["error"]) == ("library", "it failed", "RuntimeError")
    assert "test_gate.py" in line["trace"] and "private" not in line["trace"].replace('("private")', "")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("closed")])
def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch, client, error):
    class Full:
        def write(self, text):
            raise error

        flush = write

    monkeypatch.setattr(logs.sys, "stderr", Full())
    assert client.get("/health").status_code == 200


def test_ready(client, engine, helpers):
    assert client.get("/ready").json() == {"status": "ready"}
    engine.ready = False
    response = client.get("/ready")
    helpers.refused(response, 503)
    assert response.headers["retry-after"]
    helpers.refused(client.post("/v1/chat/completions", json=helpers.chat()), 503)
    assert client.get("/health").status_code == 200


def test_the_server_is_not_ready_before_masks_and_embeddings_are(stand_in, helpers, monkeypatch):
    """What runs beside the engine has run once; a model without masks, or one that fails, is served too."""
    sizes, go_on = [], threading.Event()
    monkeypatch.setattr(stand_in, "embed_image", lambda pictures: go_on.wait(10))
    monkeypatch.setattr(stand_in, "objects", lambda output, size: sizes.append(len(pj.parse(output.text, size)[0])))
    service = Service(
        types.SimpleNamespace(ready=True, stats=lambda: Stats(0, 0, 1, {}, *[0] * 8)), stand_in, HttpSettings("shapes")
    )
    service.check_ready()
    service.warm_up()
    with pytest.raises(ApiError) as caught:
        service.check_ready()
    assert caught.value.status == 503
    go_on.set()
    helpers.until(lambda: is_ready(service))
    assert sizes == [1, 2, 4, 8]
    for error in (CheckpointError("no masks"), RuntimeError("trouble")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(stand_in, "objects", fail)
        service.warm_up()
        helpers.until(lambda: is_ready(service))


def is_ready(service):
    try:
        service.check_ready()
    except ApiError:
        return False
    return True


def test_models(client, helpers):
    [model] = client.get("/v1/models").json()["data"]
    assert model == {"id": "shapes", "object": "model", "created": 0, "owned_by": "paligemma_jax"}
    assert client.get("/v1/models/shapes").json() == model
    for name in ("other", "..%2f..%2fetc%2fpasswd", "a/b"):
        helpers.refused(client.get(f"/v1/models/{name}"), 404)


def test_metrics(client, helpers):
    for _ in range(2):
        assert client.post("/v1/chat/completions", json=helpers.chat()).status_code == 200
    helpers.refused(client.post("/v1/chat/completions", json=helpers.chat(url="nothing")))
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["paligemma_num_requests_running"] == "2.0" and values["paligemma_num_requests_waiting"] == "3.0"
    assert values["paligemma_compiles_while_serving_total"] == "0.0"
    assert values["paligemma_prompt_tokens_total"] == "100.0" and values["paligemma_generation_tokens_total"] == "40.0"
    assert values['paligemma_request_success_total{finished_reason="eos"}'] == "7.0"
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "inter_token_latency"):
        assert float(values[f"paligemma_{name}_seconds_count"]) >= 2
    assert float(values["paligemma_pictures_refused_total"]) >= 1
    assert float(values['paligemma_http_requests_total{route="/v1/chat/completions",status="200"}']) >= 2


def test_docs_load_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    assert "/v1/chat/completions" in page and not re.search(r"https?://|<script|<link|@import", page)
    schema = client.get("/openapi.json").json()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert names and names <= set(schema["components"]["schemas"])
    assert client.get("/redoc").status_code == 404


# Embeddings


def test_embeddings(client, helpers):
    import base64

    import numpy as np

    def ask(**fields):
        return client.post("/v1/embed", json={"image_url": helpers.data_uri()} | fields)

    [item] = ask().json()["data"]
    assert item["shape"] == [3] and len(item["embedding"]) == 3 and item["index"] == 0
    [whole] = ask(pool="none").json()["data"]
    assert whole["shape"] == [4, 3] and np.allclose(np.mean(whole["embedding"], 0), item["embedding"])
    [packed] = ask(pool="none", encoding_format="base64", stage="features").json()["data"]
    assert len(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")) == 8
    assert len(ask(image_url=[helpers.data_uri()] * 3).json()["data"]) == 3
    helpers.refused(ask(image_url=[]), 400, "image_url")
    helpers.refused(ask(image_url=[helpers.data_uri(), "x"]), 400, "image_url[1]")
    helpers.refused(ask(image_url=[helpers.data_uri()] * 5), 400, "image_url[4]")
    helpers.refused(ask(model="other"), 404, "model")


# Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_an_open_server_needs_a_key(host):
    with pytest.raises(ConfigError, match="api_key"):
        HttpSettings("x", host=host)
    assert HttpSettings("x", host=host, keys=("k",)).host == host


@pytest.mark.parametrize(
    "host, expected", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "fields",
    [
        *({"port": -1}, {"port": 70000}, {"max_body_bytes": 0}, {"body_timeout_s": float("nan")}, {"max_pixels": -1}),
        *({"request_timeout_s": 0.0}, {"max_n": 0}, {"drain_s": -1.0}, {"requests_per_minute": -1}),
        {"cors_origins": ("*",)},
    ],
)
def test_settings_without_meaning(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        HttpSettings("x", **fields)


def test_keys_of_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys("zero", str(file)) == ("zero", "one", "two")
    assert read_keys("", "") == ()


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff", b"a b\n", "schl\u00fcssel".encode()])
def test_files_of_keys_that_are_none(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="key"):
        read_keys("", str(file))
