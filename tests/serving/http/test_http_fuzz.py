"""Bodies that are nearly right, and bodies made from the API's description: no fault of the server, whatever comes."""

import copy
import json
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
NUMBERS = [0, 1, -1, 2**31, 2**32, 2**63, 2**64, 1e300, 0.5, -0.5, 10**30]
TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "é" * 300,
    "detect cat",
    "<loc0000>",
    "<image><image> x",
    "data:,",
    "http://[",
    "x" * 20_000,
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=8),
    st.floats(allow_nan=False, allow_infinity=False),
    st.recursive(
        st.sampled_from(["type", "text", 0]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "url", "a"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def right(helpers):
    """A right body for each route."""
    uri = helpers.data_uri()
    item = {"type": "object", "properties": {"label": {"type": "string", "enum": ["cat"]}, "score": {"type": "number"}}}
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": item}}, "required": ["a"]}
    options = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.5,
        "seed": 3,
        "constrain": False,
        "stream": True,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    parts = [{"type": "input_text", "text": "detect cat"}, {"type": "input_image", "image_url": uri}]
    flat = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    drawn = {"image_url": uri, "settings": {"temperature": 0.5, "top_p": 0.5, "max_tokens": 3, "max_objects": 2}}
    brushes = '<BrushLabels name="b" toName="i"><Label value="cat"/></BrushLabels>'
    config = f'<View><Image name="i" value="$image"/>{brushes}</View>'
    return {
        "/v1/chat/completions": [
            helpers.chat("detect cat", response_format=wanted, n=2, max_tokens=9, **options),
            helpers.chat(logprobs=True, stop=["a"], stream_options={"include_usage": True}, **options),
        ],
        "/v1/responses": [
            {"input": [{"role": "user", "content": parts}], "max_output_tokens": 9, "text": flat, **options}
        ],
        "/v1/caption": [drawn | {"length": "short", "stream": True}],
        "/v1/query": [drawn | {"question": "what?", "stream": False}],
        "/v1/detect": [drawn | {"object": "cat"}],
        "/v1/point": [drawn | {"object": "cat"}],
        "/v1/segment": [drawn | {"object": "cat", "stream": True}],
        "/v1/embed": [{"image_url": [uri], "pool": "none", "stage": "projected", "encoding_format": "float"}],
        "/predict": [{"tasks": [{"id": 1, "data": {"image": uri}}], "label_config": config, "params": {"a": 1}}],
    }


def places(value, path=()):
    yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from places(inner, (*path, step))


@st.composite
def nearly_right(draw, bodies):
    """A right body with a value or two changed, left out, or added."""
    body = copy.deepcopy(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([path for path in places(body) if path]))
        parent = body
        for step in path:
            parent = parent[step]
        how = draw(st.sampled_from(["change", "change", "leave out", "add"]))
        if how == "change":
            parent[last] = draw(VALUES)
        elif how == "leave out":
            parent.pop(last)
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["$ref", "anyOf", "extra", "minItems"]))] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
    return body


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"/v1/{name}"
            for name in ("chat/completions", "responses", "caption", "query", "detect", "segment", "embed")
        ),
        "/predict",
    ],
)
def test_nearly_right_bodies(client, engine, helpers, path):
    engine.say = lambda request: "<loc0000><loc0000><loc1023><loc0512> cat"
    bodies = right(helpers)[path]
    for body in bodies:
        response = client.post(path, json=body)
        assert response.status_code == 200 and "server_error" not in response.text

    @settings(max_examples=60, **QUIET)
    @given(nearly_right(bodies))
    def check(body):
        content = json.dumps(body)  # which escapes lone surrogates
        response = client.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404), (response.text, content[:2000])
        if response.status_code != 200:
            helpers.refused(response, response.status_code)
        else:
            assert "server_error" not in response.text, (response.text, content[:2000])

    check()


@pytest.mark.slow
def test_bodies_made_from_the_description(client, helpers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis

        operations = [
            result.ok()
            for result in schemathesis.openapi.from_dict(client.get("/openapi.json").json()).get_all_operations()
        ]
    assert len(operations) >= 15
    for operation in operations:

        @settings(max_examples=40, phases=[Phase.generate], **QUIET)
        @given(operation.as_strategy())
        def check(case):
            body = {"json": case.body} if isinstance(case.body, dict | list | str | int | float | bool) else {}
            try:
                request = client.build_request(case.method, case.formatted_path, **body)
            except ValueError:  # what no client can send
                return
            assert client.send(request).status_code < 500

        check()
