"""POST /v1/chat/completions: what OpenAI's client sends and reads."""

import json

import numpy as np
import pytest

import paligemma_jax as pj
from paligemma_jax.errors import Busy, Closed, EngineFailed, Expired, SamplingError

BOXES = "<loc0000><loc0000><loc1023><loc0512> cat ; <loc0100><loc0200><loc0300><loc0400> dog"


def post(client, body):
    return client.post("/v1/chat/completions", json=body)


def events(response):
    """The values of a stream's events; it has to end with [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer_has_every_field_that_clients_read(client, engine, helpers, stand_in):
    answer = post(client, helpers.chat()).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a red circle", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage, [request] = answer["usage"], engine.requests
    assert usage["prompt_tokens"] == stand_in.processor.layout([[0]], ["caption en"]).prefix_length[0]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 4}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert request.prompt.text == "caption en" and request.images[0].size == (40, 20)


def test_the_options_are_those_of_the_request(client, engine, helpers):
    fields = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "min_p": 0.125, "seed": 3}
    body = helpers.chat(**fields, n=2, max_completion_tokens=9, stop=["x", "y"], constrain=True, user="me")
    assert post(client, body).status_code == 200
    for number, request in enumerate(engine.requests):
        sampling = pj.Sampling(0.5, top_k=7, top_p=0.75, min_p=0.125, seed=3 + number)
        assert request.options == pj.GenerateOptions(9, sampling, constrain=True)
    assert [asked["stop"] for asked in engine.asked] == [("x", "y")] * 2
    assert [asked["timeout_s"] for asked in engine.asked] == [120.0] * 2


def test_defaults_are_greedy_with_the_servers_seed(client_with, helpers):
    client = client_with(seed=11, max_new_tokens=50)
    assert post(client, helpers.chat()).status_code == 200
    assert post(client, helpers.chat(max_tokens=51)).status_code == 400


@pytest.mark.parametrize("reason, finish", [("eos", "stop"), ("stop", "stop"), ("length", "length")])
def test_why_an_answer_ends(client, engine, helpers, reason, finish):
    engine.reason = reason
    assert post(client, helpers.chat()).json()["choices"][0]["finish_reason"] == finish


def test_several_answers_and_pictures(client, engine, helpers):
    engine.say = lambda request: f"seed {request.options.sampling.seed}"
    body = helpers.chat(n=3, temperature=1, seed=2**32 - 1)
    body["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": helpers.data_uri(kind="webp")})
    choices = post(client, body).json()["choices"]
    assert [c["message"]["content"] for c in choices] == [f"seed {2**32 - 1}", "seed 0", "seed 1"]
    assert all(len(request.images) == 2 for request in engine.requests)


def test_logprobs_are_of_all_tokens_but_the_end(client, engine, helpers):
    content = post(client, helpers.chat(logprobs=True, top_logprobs=0)).json()["choices"][0]["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == "a red circle"
    assert bytes(b for item in content for b in item["bytes"]) == b"a red circle"
    assert all(item["logprob"] == -0.5 and item["top_logprobs"] == [] for item in content)


@pytest.mark.parametrize("stream", [False, True])
def test_the_most_likely_tokens_of_each_place(client, helpers, stream):
    response = post(client, helpers.chat(logprobs=True, top_logprobs=3, stream=stream))
    choices = [chunk["choices"][0] for chunk in (events(response) if stream else [response.json()])]
    content = [item for choice in choices if choice["logprobs"] for item in choice["logprobs"]["content"]]
    assert "".join(item["token"] for item in content) == "a red circle"
    for item in content:
        first, *others = item["top_logprobs"]
        assert first == {"token": item["token"], "bytes": item["bytes"], "logprob": -1.0}
        assert others == [{"token": "<eos>", "bytes": [], "logprob": logprob} for logprob in (-2.0, -3.0)]


def test_a_stream_grows_and_ends_with_its_reason(client, engine, helpers):
    body = helpers.chat(stream=True, n=2, logprobs=True, stream_options={"include_usage": True})
    *chunks, last = events(post(client, body))
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert [choice["delta"]["content"] for choice in own[1:-1]] == ["a", " red", " circle"]
        assert own[-1]["finish_reason"] == "stop" and own[-1]["delta"] == {}
        assert all(choice["logprobs"]["content"] for choice in own[1:-1])
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 2


def test_an_error_in_a_stream_is_its_last_event(client, engine, helpers):
    engine.say = lambda request: EngineFailed("secret")
    response = post(client, helpers.chat(stream=True))
    *_, last = [line for line in response.text.split("\n\n") if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    engine.say = lambda request: "back"
    assert post(client, helpers.chat()).json()["choices"][0]["message"]["content"] == "back"


# JSON


@pytest.mark.parametrize("stream", [False, True])
def test_objects_as_json(client, engine, helpers, stream):
    engine.say = lambda request: BOXES
    body = helpers.chat("detect cat ; dog", response_format={"type": "json_object"}, stream=stream)
    response = post(client, body)
    if stream:
        contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(response)]
        assert len(list(filter(None, contents))) == 1
        value = json.loads("".join(contents))
    else:
        value = json.loads(response.json()["choices"][0]["message"]["content"])
    cat, dog = value["objects"]
    assert cat["label"] == "cat" and cat["box"] == [0, 0, pytest.approx(20.02, abs=0.01), 20] and 0 < cat["score"] < 1
    assert dog["label"] == "dog"
    assert engine.requests[0].options.constrain


def test_objects_in_the_form_of_a_schema(client, engine, helpers):
    engine.say = lambda request: BOXES
    item = {"type": "object", "properties": {"x_min": {"type": "number"}, "label": {"type": "string"}}}
    schema = {"type": "object", "properties": {"found": {"type": "array", "items": item}}, "required": ["found"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "boxes", "schema": schema, "strict": True}}
    answer = post(client, helpers.chat("detect cat ; dog", response_format=wanted)).json()
    value = json.loads(answer["choices"][0]["message"]["content"])
    assert value == {"found": [{"x_min": 0.0, "label": "cat"}, {"x_min": pytest.approx(0.1955), "label": "dog"}]}


@pytest.mark.parametrize(
    "prompt, fields, param",
    [
        ("caption en", {}, "response_format"),
        ("detect", {}, "response_format"),
        ("detect cat", {"logprobs": True}, "logprobs"),
        ("detect cat", {"stop": ";"}, "stop"),
    ],
)
def test_json_that_cannot_be(client, helpers, prompt, fields, param):
    body = helpers.chat(prompt, response_format={"type": "json_object"}, **fields)
    helpers.refused(post(client, body), 400, param)


# Refused


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"n": 10**6}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "system", "content": "be nice"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "caption en"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
    ],
)
def test_what_is_not_supported_is_named(client, engine, helpers, fields, param):
    body = helpers.chat(**fields)
    body = {key: value for key, value in body.items() if value is not None}
    assert helpers.refused(post(client, body), 400, param)
    assert not engine.requests


@pytest.mark.parametrize(
    "fields",
    [{"presence_penalty": 0, "tools": [], "stream": False, "seed": None, "metadata": {"a": "b"}, "store": False}],
)
def test_what_asks_for_nothing_is_accepted(client, helpers, fields):
    assert post(client, helpers.chat(**fields)).status_code == 200


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "/etc/passwd", "", "shapes\0", "SHAPES"])
def test_other_models_are_not_found(client, helpers, name):
    helpers.refused(post(client, helpers.chat(model=name)), 404, "model")


@pytest.mark.parametrize("picture", ["text", None])
def test_a_picture_and_a_text_are_needed(client, helpers, picture):
    body = helpers.chat()
    body["messages"][0]["content"].pop(0 if picture is None else 1)
    assert ("picture" if picture is None else "text") in helpers.refused(post(client, body), 400, "messages[0].content")


@pytest.mark.parametrize(
    "error, status, param",
    [
        (Busy("many wait"), 429, None),
        (Closed("stopping"), 503, None),
        (SamplingError("num_beams=2 is not possible: give 1"), 400, "num_beams"),
        (RuntimeError("a secret"), 500, None),
        (MemoryError(), 500, None),
    ],
)
def test_what_the_engine_refuses(client, engine, helpers, error, status, param):
    engine.refusal = error
    response = post(client, helpers.chat())
    assert "secret" not in helpers.refused(response, status, param)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    engine.refusal = None
    assert post(client, helpers.chat()).status_code == 200


@pytest.mark.parametrize(
    "error, status", [(Expired("late"), 504), (EngineFailed("x"), 500), (ZeroDivisionError(), 500)]
)
def test_what_ends_an_answer(client, engine, helpers, error, status):
    engine.say = lambda request: error
    helpers.refused(post(client, helpers.chat()), status)
    engine.say = lambda request: "back"
    assert post(client, helpers.chat()).status_code == 200


def test_one_refused_of_n_takes_the_others_back(client, engine, helpers):
    engine.held = True
    engine.refusal = lambda request: Busy("full") if len(engine.requests) == 2 else None
    helpers.refused(post(client, helpers.chat(n=3)), 429)
    assert len(engine.answers) == 2 and all(answer.cancelled.is_set() for answer in engine.answers)


def test_one_failed_of_n_takes_the_others_back(client, engine, helpers):
    engine.held = True
    engine.say = lambda request: EngineFailed("x") if request.options.sampling.seed == 1 else "a red circle"
    helpers.refused(post(client, helpers.chat(n=2)), 500)
    assert engine.answers[0].cancelled.is_set()


def test_infinite_logprobs_are_written_as_numbers(client, engine, helpers, monkeypatch):
    plain = engine._events
    monkeypatch.setattr(engine, "_events", lambda *said: [_certain(event) for event in plain(*said)])
    content = post(client, helpers.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert {item["logprob"] for item in content} == {-9999.0}


def _certain(event):
    if hasattr(event, "output"):
        event.output.logprobs[:] = -np.inf
    return event
