"""The routes of moondream's client: its bodies, its answers, and its header for the key."""

import json

import pytest
from PIL import Image

BOX = "<loc0000><loc0000><loc1023><loc0512>"
MASKED = BOX + "".join(f"<seg{i:03d}>" for i in range(16))


def body(helpers, **fields):
    return {"image_url": helpers.data_uri(kind="jpeg")} | fields


@pytest.mark.parametrize("length, prompt", [("short", "cap en"), ("normal", "caption en"), ("long", "describe en")])
def test_caption(client, engine, helpers, length, prompt):
    answer = client.post("/v1/caption", json=body(helpers, length=length, stream=False))
    assert answer.json() == {"caption": "a red circle"}
    assert engine.requests[0].prompt.text == prompt


def test_query_with_settings(client, engine, helpers):
    settings = {"temperature": 0.5, "top_p": 0.75, "max_tokens": 9}
    answer = client.post("/v1/query", json=body(helpers, question=" what? ", stream=False, settings=settings))
    assert answer.json() == {"answer": "a red circle"}
    options = engine.requests[0].options
    assert engine.requests[0].prompt.text == "answer en what?"
    assert (options.sampling.temperature, options.sampling.top_p, options.max_new_tokens) == (0.5, 0.75, 9)


@pytest.mark.parametrize("route, fields", [("caption", {}), ("query", {"question": "what?"})])
def test_streams(client, helpers, route, fields):
    response = client.post(f"/v1/{route}", json=body(helpers, stream=True, **fields))
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if event]
    assert "".join(chunk["chunk"] for chunk in chunks) == "a red circle" and last == {"completed": True}


def test_detect_and_point(client, engine, helpers):
    engine.say = lambda request: f"{BOX} cat ; <loc0512><loc0512><loc1023><loc1023> cat ; {BOX} cat"
    found = client.post("/v1/detect", json=body(helpers, object="cat")).json()
    half = pytest.approx(0.5, abs=1e-3)
    assert found == {
        "objects": [
            {"x_min": 0, "y_min": 0, "x_max": half, "y_max": 1},
            {"x_min": half, "y_min": half, "x_max": 1, "y_max": 1},
        ]
    }
    points = client.post("/v1/point", json=body(helpers, object="cat")).json()
    assert points["points"][0] == {"x": pytest.approx(0.25, abs=1e-3), "y": 0.5}
    assert all(request.options.constrain and request.prompt.text == "detect cat" for request in engine.requests)
    few = client.post("/v1/detect", json=body(helpers, object="cat", settings={"max_objects": 1})).json()
    assert len(few["objects"]) == 1


def test_segment(client, engine, helpers):
    engine.say = lambda request: f"{MASKED} cat"
    answer = client.post("/v1/segment", json=body(helpers, object="cat", stream=False)).json()
    assert answer["path"] == "M 0 0 L 0.5 0 L 0.5 1 L 0 1 Z"
    assert answer["bbox"] == {"x_min": 0, "y_min": 0, "x_max": pytest.approx(0.5, abs=1e-3), "y_max": 1}
    response = client.post("/v1/segment", json=body(helpers, object="cat", stream=True))
    events = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if event]
    assert events == [
        {"type": "bbox", "bbox": answer["bbox"]},
        {"type": "final", "completed": True, **answer},
    ]


def test_masks_of_large_pictures_are_not_decoded_in_full(client, engine, helpers, stand_in, monkeypatch):
    sizes, plain = [], stand_in.objects
    monkeypatch.setattr(
        stand_in, "objects", lambda output, size, **rest: sizes.append(size) or plain(output, size, **rest)
    )
    engine.say = lambda request: f"{MASKED} cat"
    large = helpers.data_uri(Image.new("RGB", (4096, 2048)), "jpeg")
    answer = client.post("/v1/segment", json={"image_url": large, "object": "cat"}).json()
    assert sizes == [(1024, 512)] and answer["path"] == "M 0 0 L 0.5 0 L 0.5 1 L 0 1 Z"
    assert answer["bbox"]["x_max"] == pytest.approx(512 / 1023, abs=1e-4)


def test_nothing_is_found(client, engine, helpers):
    engine.say = lambda request: ""
    assert client.post("/v1/detect", json=body(helpers, object="cat")).json() == {"objects": []}
    assert client.post("/v1/segment", json=body(helpers, object="cat")).json() == {"path": "", "bbox": None}


def test_a_model_without_masks_says_so(client, engine, helpers, stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "has_masks", False)
    assert "vae-oid.npz" in helpers.refused(client.post("/v1/segment", json=body(helpers, object="cat")), 501)
    assert not engine.requests


def test_its_header_holds_the_key(client_with, helpers):
    client = client_with(keys=("secret",))
    assert client.post("/v1/caption", json=body(helpers), headers={"X-Moondream-Auth": "secret"}).status_code == 200
    helpers.refused(client.post("/v1/caption", json=body(helpers), headers={"X-Moondream-Auth": "other"}), 401)


@pytest.mark.parametrize(
    "route, fields, param",
    [
        ("caption", {"length": "endless"}, "length"),
        ("query", {}, "question"),
        ("query", {"question": " "}, "question"),
        ("query", {"question": "what?", "reasoning": True}, "reasoning"),
        ("detect", {"object": "cat", "spatial_refs": [[0.5, 0.5]]}, "spatial_refs"),
        ("detect", {"object": ""}, "object"),
        ("detect", {"object": " ; "}, "object"),
        ("point", {"object": "<loc0001>"}, "object"),
        ("segment", {}, "object"),
        ("detect", {"object": "cat", "settings": {"max_tokens": 10**6}}, "settings.max_tokens"),
        ("caption", {"model": "other"}, "model"),
    ],
)
def test_what_is_not_supported_is_named(client, helpers, route, fields, param):
    helpers.refused(client.post(f"/v1/{route}", json=body(helpers, **fields)), 404 if param == "model" else 400, param)


def test_a_picture_is_needed(client, helpers):
    helpers.refused(client.post("/v1/query", json={"question": "what?"}), 400, "image_url")
