"""Label Studio as a client: its XML, its tasks, its regions."""

import base64

import numpy as np
import pytest

from paligemma_jax.serving.http.outlines import brush_rle

RECTANGLES = """<View><Image name="img" value="$image"/>
  <RectangleLabels name="rect" toName="img"><Label value="cat"/><Label value="dog"/></RectangleLabels></View>"""
BRUSHES = RECTANGLES.replace("RectangleLabels", "BrushLabels")
BOX = "<loc0000><loc0000><loc1023><loc0512>"
MASKED = BOX + "".join(f"<seg{i:03d}>" for i in range(16))


def predict(client, tasks, config=RECTANGLES, **fields):
    body = {"tasks": tasks, "label_config": config, "project": "1.17", "params": {"context": {}}}
    return client.post("/predict", json=body | fields)


def task(url, number=1):
    return {"id": number, "data": {"image": url}, "annotations": [], "is_labeled": False}


def test_rectangles_are_percentages(client, engine, helpers):
    engine.say = lambda request: f"{BOX} dog"
    answer = predict(client, [task(helpers.data_uri())]).json()
    [result] = answer["results"]
    [region] = result["result"]
    assert result["model_version"] == helpers.name and result["score"] == region["score"] > 0
    assert (region["from_name"], region["to_name"], region["type"]) == ("rect", "img", "rectanglelabels")
    assert (region["original_width"], region["original_height"]) == (40, 20)
    assert region["value"] == {
        **{"x": 0, "y": 0, "width": pytest.approx(50.05, abs=0.01), "height": 100, "rotation": 0},
        "rectanglelabels": ["dog"],
    }
    assert engine.requests[0].prompt.text == "detect cat ; dog" and engine.requests[0].options.constrain


def test_brushes_are_run_lengths(client, engine, helpers):
    engine.say = lambda request: f"{MASKED} cat"
    [region] = predict(client, [task(helpers.data_uri())], BRUSHES).json()["results"][0]["result"]
    assert region["type"] == "brushlabels" and region["value"]["brushlabels"] == ["cat"]
    mask = decode(region["value"]["rle"]).reshape(20, 40, 4)
    assert (mask == mask[:, :, :1]).all()
    assert mask[:, :10].min() == 255 and mask[:, 11:].max() == 0


def test_one_result_per_task_and_a_bad_picture_is_its_own_fault(client, engine, helpers):
    engine.say = lambda request: f"{BOX} cat"
    tasks = [task(helpers.data_uri()), task("/data/upload/1.png"), {"data": {}}, task(helpers.data_uri())]
    results = predict(client, tasks).json()["results"]
    assert [len(result["result"]) for result in results] == [1, 0, 0, 1]
    assert "data URI" in results[1]["error"] and "missing" in results[2]["error"]


def test_setup_and_health(client, helpers):
    assert client.post("/setup", json={"project": "1", "schema": RECTANGLES}).json() == {"model_version": helpers.name}
    assert client.get("/health").json() == {"status": "UP", "model_class": "PaliGemma"}


def test_its_password_is_the_key(client_with, helpers):
    client = client_with(keys=("secret",))
    for password, status in (("secret", 200), ("other", 401)):
        token = base64.b64encode(f"user:{password}".encode()).decode()
        assert client.post("/setup", headers={"authorization": f"Basic {token}"}).status_code == status
    assert client.post("/setup", headers={"authorization": "Basic !"}).status_code == 401


@pytest.mark.parametrize(
    "config",
    [
        "no xml <",
        "",
        "<View/>",
        RECTANGLES.replace("RectangleLabels", "PolygonLabels"),
        RECTANGLES.replace('toName="img"', 'toName="other"'),
        '<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd"><View/>',
        RECTANGLES.replace("cat", "&lt;loc0001&gt;"),
        RECTANGLES.replace('<Label value="cat"/>', "".join(f'<Label value="a{i}"/>' for i in range(200))),
    ],
)
def test_other_configs_are_refused(client, helpers, config):
    helpers.refused(predict(client, [task(helpers.data_uri())], config), 400, "label_config")


def test_tasks_are_bounded(client, helpers):
    helpers.refused(predict(client, [task("x")] * 65), 400, "tasks")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 400)])
def test_run_lengths_can_be_read_again(shape):
    rng = np.random.default_rng(0)
    for mask in (rng.random(shape) < 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
        assert (decode(brush_rle(mask)).reshape(*shape, 4)[:, :, 0] == 255 * mask).all()


def decode(data):
    """Label Studio's reader, by its description: runs and, where the first bit is 0, single values."""
    bits = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def read(count):
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, value_bits = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < total:
        is_run = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(value_bits)] * length if is_run else [read(value_bits) for _ in range(length)]
    return np.array(values)
