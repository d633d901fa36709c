"""The server as users start it, and the clients of others: OpenAI's, moondream's bodies, the documentation's own."""

import http.client
import json
import runpy
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pj
from benchmarks import serving_http

ROOT = Path(__file__).resolve().parents[2]
JSON = {"content-type": "application/json"}
PICTURE = ROOT / "assets" / "examples" / "shapes.png"

pytestmark = pytest.mark.slow


def running(*arguments):
    """A server process that is ready, on a free port: (process, port)."""
    return serving_http.running("--config.platform=cpu", *arguments)


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


def test_the_client_of_the_documentation(server, uri):
    client = runpy.run_path(str(ROOT / "docs" / "deploy" / "client.py"))["Client"](
        f"http://127.0.0.1:{server}", "secret"
    )
    assert client.caption(str(PICTURE)) == "a purple circle, a yellow square and a blue star"
    assert "".join(client.stream("caption en", str(PICTURE))) == client.caption(str(PICTURE))
    [box] = client.detect(str(PICTURE), "star")
    assert box["x_min"] == pytest.approx(0.33, abs=0.1)


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
