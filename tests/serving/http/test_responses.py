"""POST /v1/responses."""

import json

import pytest

BOX = "<loc0000><loc0000><loc1023><loc1023> cat"


def body(helpers, prompt="caption en", **fields):
    parts = [{"type": "input_text", "text": prompt}, {"type": "input_image", "image_url": helpers.data_uri()}]
    return {"model": helpers.name, "input": [{"role": "user", "content": parts}]} | fields


def test_an_answer(client, engine, helpers):
    answer = client.post("/v1/responses", json=body(helpers, max_output_tokens=7, temperature=0.5)).json()
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    [message] = answer["output"]
    [part] = message["content"]
    assert (message["role"], part["type"], part["text"]) == ("assistant", "output_text", "a red circle")
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"]
    assert engine.requests[0].options.max_new_tokens == 7
    assert engine.requests[0].options.sampling.temperature == 0.5


def test_an_answer_that_was_cut_off_is_incomplete(client, engine, helpers):
    engine.reason = "length"
    answer = client.post("/v1/responses", json=body(helpers)).json()
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_has_all_events_in_order(client, helpers):
    response = client.post("/v1/responses", json=body(helpers, stream=True))
    pairs = [event.split("\n") for event in response.text.split("\n\n") if event]
    values = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [f"event: {value['type']}" for value in values] == [name for name, _ in pairs]
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    kinds = [value["type"].removeprefix("response.") for value in values]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 3,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(value.get("delta", "") for value in values) == "a red circle" == values[-4]["text"]
    assert values[-1]["response"]["output"][0]["content"][0]["text"] == "a red circle"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_logprobs_are_included_when_asked_for(client, helpers, stream, count):
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": count, "stream": stream}
    response = client.post("/v1/responses", json=body(helpers, **wanted))
    values = [json.loads(event.partition("data: ")[2]) for event in response.text.split("\n\n") if event and stream]
    answer = values[-1]["response"] if stream else response.json()
    content = answer["output"][0]["content"][0]["logprobs"]
    assert "".join(item["token"] for item in content) == "a red circle" and answer["top_logprobs"] == count
    first, eos = {"logprob": -1.0}, {"token": "<eos>", "bytes": [], "logprob": -2.0}
    for item in content:
        own = {name: item[name] for name in ("token", "bytes")}
        assert item == own | {"logprob": -0.5, "top_logprobs": [own | first, eos][:count]}
    if stream:
        heard = [item for value in values if value["type"].endswith("text.delta") for item in value["logprobs"]]
        done = next(value for value in values if value["type"].endswith("text.done"))["logprobs"]
        assert heard == done and [item["token"] for item in heard] == [item["token"] for item in content]
        assert all(set(item) == {"token", "logprob", "top_logprobs"} for item in heard)
        assert all(set(other) == {"token", "logprob"} for item in heard for other in item["top_logprobs"])


@pytest.mark.parametrize("stream", [False, True])
def test_objects_as_json(client, engine, helpers, stream):
    engine.say = lambda request: BOX
    item = {"type": "object", "properties": {"label": {"type": "string"}}}
    schema = {"type": "object", "properties": {"things": {"type": "array", "items": item}}}
    wanted = {"format": {"type": "json_schema", "name": "things", "schema": schema}}
    response = client.post("/v1/responses", json=body(helpers, "detect cat", text=wanted, stream=stream))
    answer = json.loads(response.text.rstrip().rpartition("data: ")[2])["response"] if stream else response.json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"things": [{"label": "cat"}]}


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": "caption en"}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": "caption en"}]}, "input[0].content"),
        ({"input": [{"role": "assistant", "content": "hello"}]}, "input[0].role"),
        ({"instructions": "be nice"}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ],
)
def test_what_is_not_supported_is_named(client, helpers, fields, param):
    helpers.refused(client.post("/v1/responses", json=body(helpers, **fields)), 400, param)
