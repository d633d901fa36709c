"""config.run=serve: what its keys tell the engine and the server; a real one, with the clients of others."""

import contextlib
import http.client
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError
from paligemma_jax.runs import model as models
from paligemma_jax.serving.engine import EngineSettings

ROOT = Path(__file__).resolve().parents[2]
JSON = {"content-type": "application/json"}
PICTURE = ROOT / "assets" / "examples" / "shapes.png"


@pytest.fixture
def serve(main, monkeypatch):
    """serve(KEY=VALUE, ...): exit status, stderr, and what was told to whom: load, engine, http; nothing is loaded."""
    told = {}

    class Engine:
        def __init__(self, model, settings):
            told["engine"] = settings

        def start(self):
            told["started"] = True

        def close(self):
            told["closed"] = True

    def load(path, **options):
        told["load"] = {"path": path} | options
        return "a model"

    monkeypatch.setattr(pj, "load", load)
    monkeypatch.setattr("paligemma_jax.runs.serve.Engine", Engine)
    monkeypatch.setattr("paligemma_jax.serving.http.service.Metrics", lambda stats: None)
    monkeypatch.setattr("paligemma_jax.serving.http.warming.warm_up", lambda model: told.update(warmed=model))
    monkeypatch.setattr(Engine, "stats", None, raising=False)
    monkeypatch.setattr(
        "paligemma_jax.serving.http.server.serve", lambda service, sock: told.update(http=service.settings)
    )

    def run(**keys):
        told.clear()
        keys = {"port": 0, "compilation_cache": False} | keys
        status, _, err = main("--config=configs/serve.py", *(f"--config.{key}={value}" for key, value in keys.items()))
        return status, err, dict(told)

    return run


def test_what_is_loaded_and_for_how_many(serve, tmp_path):
    """checkpoint, adapter, dtype, quantization, mask_vae and num_slots."""
    keys = {"checkpoint": tmp_path, "dtype": "bfloat16", "quantization": "int8", "mask_vae": tmp_path / "m.npz"}
    status, _, told = serve(**keys, adapter="org/lora", num_slots=3)
    assert status == 0
    assert told["load"]["path"] == str(tmp_path) and told["load"]["mask_vae"] == str(tmp_path / "m.npz")
    assert told["load"]["dtype"] == "bfloat16" and told["load"]["quantization"] == "int8"
    assert told["load"]["adapter"] == "org/lora" and told["load"]["batch_size"] == 3


def test_resample_is_that_of_the_model(serve, monkeypatch):
    seen = []
    monkeypatch.setattr(models, "load", lambda config, **options: seen.append(config.resample))
    assert serve(resample="bilinear")[0] == 0
    assert seen == ["bilinear"]


def test_what_the_engine_is_told(serve):
    """num_slots, max_waiting, max_new_tokens, max_prompt_tokens, max_images, cache_bytes and num_steps."""
    names = (
        "num_slots",
        "max_waiting",
        "max_new_tokens",
        "max_prompt_tokens",
        "max_images",
        "cache_bytes",
        "num_steps",
    )
    values = {name: number for number, name in enumerate(names, 3)}
    assert serve(**values)[2]["engine"] == EngineSettings(**values)
    told = serve()[2]
    assert told["engine"] == EngineSettings() and told["started"] and told["closed"]
    assert told["warmed"] == "a model"


def test_what_the_server_is_told(serve, tmp_path):
    """seed, model_name, loc_scale, trusted_proxies and the limits."""
    values = {
        **{"max_body_bytes": 5, "max_pixels": 6, "max_n": 7, "requests_per_minute": 8, "max_new_tokens": 9},
        **{"body_timeout_s": 0.5, "request_timeout_s": 1.5, "drain_s": 2.5, "seed": 3, "max_images": 2},
        **{"loc_scale": 1024, "model_name": "mine", "trusted_proxies": "10.0.0.1", "host": "127.0.0.2"},
    }
    settings = serve(**values)[2]["http"]
    assert {name: getattr(settings, name) for name in values} == values
    assert settings.port == 0


def test_names_with_commas(serve):
    """image_hosts and cors_origins."""
    settings = serve(image_hosts="a.example, b.example:8080,", cors_origins="https://c.example")[2]["http"]
    assert settings.image_hosts == ("a.example", "b.example:8080") and settings.cors_origins == ("https://c.example",)


def test_keys(serve, tmp_path):
    """api_key and api_key_file."""
    (tmp_path / "keys").write_text("one\ntwo\n")
    assert serve(api_key="zero", api_key_file=tmp_path / "keys")[2]["http"].keys == ("zero", "one", "two")


@pytest.mark.parametrize(
    "checkpoint, name",
    [
        ("google/paligemma-3b-mix-224", "google/paligemma-3b-mix-224"),
        *(("me/model@v1.0", "me/model@v1.0"), ("output/mine/", "mine"), ("./mine", "mine"), ("a/b.npz", "b.npz")),
        ("assets/tiny", "tiny"),
    ],
)
def test_a_model_without_a_name_has_that_of_its_checkpoint(serve, checkpoint, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert serve(checkpoint=checkpoint)[2]["http"].model_name == name


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"host": "0.0.0.0"}, "host='0.0.0.0' lets other machines in: set api_key or api_key_file"),
        ({"port": 99999}, "port=99999 is not possible"),
        ({"api_key_file": "nowhere"}, "api_key_file nowhere cannot be read"),
        ({"api_key": "a b"}, "api_key has blanks"),
        ({"max_n": 0}, "max_n=0 is not possible"),
        ({"num_slots": 0}, "num_slots=0 is not possible"),
        ({"loc_scale": 5}, "loc_scale=5 is not possible"),
        ({"cors_origins": "*"}, "cors_origins='*'"),
        ({"checkpoint": ""}, "no checkpoint is given"),
        ({"dtype": "int8"}, "dtype='int8' is not possible"),
    ],
)
def test_what_cannot_be_is_one_line(serve, keys, message):
    status, err, told = serve(**keys)
    assert status == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert "load" not in told or "dtype" in keys


def test_a_missing_package_names_the_extra(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, err, _ = serve()
    assert status == 1 and err == 'error: run=serve needs uvicorn: pip install -e ".[serve]"\n'


def test_the_engine_is_closed_whatever_ends_the_server(serve, monkeypatch):
    def fail(service, sock):
        raise CheckpointError("trouble")

    monkeypatch.setattr("paligemma_jax.serving.http.server.serve", fail)
    status, _, told = serve()
    assert status == 1 and told["closed"]


# The real thing


@contextlib.contextmanager
def running(*arguments):
    """A server process that is ready, on a free port: (process, port)."""
    command = [sys.executable, "main.py", "--config=configs/serve.py", "--config.port=0", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    reader = threading.Thread(target=process.stderr.read, daemon=True)  # or the pipe is full one day
    try:
        port = int(re.search(r":(\d+): /ready", process.stderr.readline())[1])
        reader.start()
        deadline = time.monotonic() + 300
        while ask(port, "GET", "/ready")[0] != 200:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        process.stderr.close()


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, JSON | (headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server():
    with running("--config.num_slots=4", "--config.api_key=secret", "--config.max_new_tokens=128") as (_, port):
        yield port


@pytest.fixture(scope="module")
def uri():
    client = runpy.run_path(str(ROOT / "docs" / "deploy" / "client.py"))
    return client["data_uri"](str(PICTURE))


@pytest.mark.slow
def test_openais_client(server, uri):
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="secret", max_retries=0)
    [model] = client.models.list().data

    def chat(prompt, **fields):
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": prompt}]
        return client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": content}], **fields)

    caption = "a purple circle, a yellow square and a blue star"
    whole = chat("caption en", logprobs=True, n=2)
    assert [choice.message.content for choice in whole.choices] == [caption] * 2
    assert "".join(item.token for item in whole.choices[0].logprobs.content) == caption
    chunks = list(chat("caption en", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == caption
    assert chunks[-1].usage.completion_tokens > 5 and len(chunks) > 4
    assert chat("caption en", stop=" and").choices[0].message.content == "a purple circle, a yellow square"
    sampled = [chat("caption en", temperature=1.5, seed=5).choices[0].message.content for _ in range(2)]
    assert sampled[0] == sampled[1]
    [found] = json.loads(chat("detect star", response_format={"type": "json_object"}).choices[0].message.content)[
        "objects"
    ]
    assert found["label"] == "star" and found["box"] == pytest.approx([125.6, 256.8, 227.2, 356.3], abs=1)
    content = [{"type": "input_text", "text": "caption en"}, {"type": "input_image", "image_url": uri}]
    asked = {"model": model.id, "input": [{"role": "user", "content": content}]}
    assert client.responses.create(**asked).output_text == caption
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == caption
    for error, fields in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"n": 10**6}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ):
        with pytest.raises(error) as caught:
            chat("caption en", **fields)
        assert caught.value.param in {*fields, "tools"} and caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="x", max_retries=0).models.list()


@pytest.mark.slow
def test_top_logprobs_are_those_of_the_models_logits(server, uri):
    """In both APIs, streamed and not, alone and in a crowd that asks for none; greedy and sampled."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="secret", max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "caption en"}]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "logprobs": True}
    sampled = {"temperature": 1.5, "seed": 5}

    def chat(**fields):
        return client.chat.completions.create(**asked, **fields)

    def scores(items):
        return [(i.token, bytes(i.bytes), [(t.token, bytes(t.bytes)) for t in i.top_logprobs]) for i in items]

    def numbers(items):
        return np.array([[i.logprob, *(t.logprob for t in i.top_logprobs)] for i in items])

    with ThreadPoolExecutor(8) as pool:
        crowd = [pool.submit(chat, **sampled, n=2) for _ in range(4)]
        wanted = [pool.submit(chat, **fields, top_logprobs=20) for fields in ({}, sampled)]
        greedy, drawn = (each.result().choices[0].logprobs.content for each in wanted)
        assert all(not item.top_logprobs for each in crowd for item in each.result().choices[0].logprobs.content)
    alone = chat(top_logprobs=20).choices[0].logprobs.content
    assert scores(alone) == scores(greedy)
    np.testing.assert_allclose(numbers(alone), numbers(greedy), rtol=1e-4, atol=1e-4)
    model = pj.load(ROOT / "assets" / "tiny", "float32")
    tokenizer = model.processor.tokenizer
    for items in (greedy, drawn):
        text = b"".join(bytes(item.bytes) for item in items).decode()
        logits = model.logits(str(PICTURE), "caption en", text)[0].astype(np.float64)
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        said = tokenizer.encode(text)
        assert [tokenizer.token_bytes(id_) for id_ in said] == [bytes(item.bytes) for item in items]
        for item, id_, right in zip(items, said, logprobs, strict=False):  # <eos> is no item
            assert item.logprob == pytest.approx(right[id_], abs=1e-3)
            ranked = -np.sort(-right)[:20]
            np.testing.assert_allclose([top.logprob for top in item.top_logprobs], ranked, rtol=1e-3, atol=1e-3)
            assert item.logprob in [top.logprob for top in item.top_logprobs] or item.logprob < ranked[-1]
    chunks = [c.choices[0].logprobs for c in chat(stream=True, top_logprobs=3) if c.choices[0].logprobs]
    streamed = [item for each in chunks for item in each.content]
    whole = chat(top_logprobs=3).choices[0].logprobs.content
    assert scores(streamed) == scores(whole) and all(len(item.top_logprobs) == 3 for item in whole)
    parts = [{"type": "input_text", "text": "caption en"}, {"type": "input_image", "image_url": uri}]
    body = {"model": "tiny", "input": [{"role": "user", "content": parts}], "top_logprobs": 3}
    body["include"] = ["message.output_text.logprobs"]
    assert scores(client.responses.create(**body).output[0].content[0].logprobs) == scores(whole)
    with client.responses.stream(**body) as stream:
        deltas = [item for event in stream if event.type == "response.output_text.delta" for item in event.logprobs]
    assert [item.token for item in deltas] == [item.token for item in whole]
    assert all(len(item.top_logprobs) == 3 for item in deltas)
    status, content = ask(server, "GET", "/metrics", headers={"Authorization": "Bearer secret"})
    assert status == 200 and b"\npaligemma_compiles_while_serving_total 0.0" in content


@pytest.mark.slow
def test_openais_client_parses_objects_into_a_type(server, uri):
    import openai
    import pydantic

    class Found(pydantic.BaseModel):
        label: str
        score: float

    class Answer(pydantic.BaseModel):
        things: list[Found]

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="secret", max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "detect circle ; star"}]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.parse(model="tiny", messages=messages, response_format=Answer)
    assert [found.label for found in answer.choices[0].message.parsed.things] == ["circle", "star"]


@pytest.mark.slow
def test_the_client_of_the_documentation(server, uri):
    client = runpy.run_path(str(ROOT / "docs" / "deploy" / "client.py"))["Client"](
        f"http://127.0.0.1:{server}", "secret"
    )
    assert client.caption(str(PICTURE)) == "a purple circle, a yellow square and a blue star"
    assert "".join(client.stream("caption en", str(PICTURE))) == client.caption(str(PICTURE))
    [box] = client.detect(str(PICTURE), "star")
    assert box["x_min"] == pytest.approx(0.33, abs=0.1)


@pytest.mark.slow
def test_moondreams_bodies(server, uri):
    def post(name, **fields):
        status, content = ask(
            server, "POST", f"/v1/{name}", {"image_url": uri} | fields, {"X-Moondream-Auth": "secret"}
        )
        assert status == 200
        return json.loads(content)

    assert post("query", question="how many circles are there?", stream=False)["answer"]
    assert len(post("detect", object="star")["objects"]) == len(post("point", object="star")["points"]) == 1
    segment = post("segment", object="star", stream=False)
    assert segment["path"].startswith("M ") and set(segment["bbox"]) == {"x_min", "y_min", "x_max", "y_max"}
    [embedding] = post("embed")["data"]
    assert len(embedding["embedding"]) == embedding["shape"][0]


@pytest.mark.slow
def test_answers_in_a_crowd_are_those_given_alone(server, uri):
    """Greedy and seeded, streamed, constrained and as JSON, some clients leaving; nothing is compiled meanwhile."""
    headers = {"Authorization": "Bearer secret"}
    stars = runpy.run_path(str(ROOT / "docs" / "deploy" / "client.py"))["data_uri"](str(PICTURE.with_name("stars.png")))

    def body(prompt, url, **fields):
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": prompt}]
        return {"messages": [{"role": "user", "content": content}], **fields}

    bodies = [
        body(prompt, url, **fields)
        for url in (uri, stars)
        for prompt in ("caption en", "answer en how many stars are there?", "detect circle ; star", "segment star")
        for fields in ({}, {"temperature": 1.0, "seed": 7}, {"constrain": True, "max_tokens": 30, "stream": True})
    ]
    bodies.append(body("detect star", uri, response_format={"type": "json_object"}))

    def answer(asked):
        status, content = ask(server, "POST", "/v1/chat/completions", asked, headers)
        assert status == 200
        if not asked.get("stream"):
            return json.loads(content)["choices"][0]["message"]["content"]
        *events, done = [event for event in content.decode().split("\n\n") if event.startswith("data: ")]
        assert done == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    def leave(asked):
        connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(asked | {"stream": True}), headers | JSON)
        connection.getresponse().read(100)
        connection.close()

    alone = [answer(asked) for asked in bodies]
    with ThreadPoolExecutor(24) as pool:
        left = [pool.submit(leave, asked) for asked in bodies[:8]]
        crowd = list(pool.map(answer, bodies * 3))
        assert not any(future.exception() for future in left)
    assert crowd == alone * 3
    metrics = ask(server, "GET", "/metrics", None, headers)[1].decode()
    assert "paligemma_compiles_while_serving_total 0.0" in metrics


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_the_end_under_load(uri, signals):
    """Running answers are finished at the first signal, and none is at the second."""
    with running("--config.num_slots=2", "--config.max_new_tokens=64") as (process, port):
        content = [{"type": "image_url", "image_url": uri}, {"type": "text", "text": "caption en"}]
        body = {"messages": [{"role": "user", "content": content}], "n": 8, "temperature": 2.0, "max_tokens": 64}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        deadline = time.monotonic() + 20
        while b"num_requests_running 0.0" in ask(port, "GET", "/metrics")[1]:
            assert time.monotonic() < deadline
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        if signals == 1:
            response = connection.getresponse()
            assert response.status == 200 and len(json.loads(response.read())["choices"]) == 8
        connection.close()
        assert process.wait(20) == (0 if signals == 1 else 128 + signal.SIGTERM)
