"""What is kept of a run beside its lines on stderr."""

import json
import sys
import types

import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.tasks.detection import Detection
from paligemma_jax.training.logs import JsonLines, SamplePages, TensorBoard, Wandb, kinds, make_loggers
from paligemma_jax.training.samples import Sample, to_html

GREY = Image.new("RGB", (400, 200), (90, 90, 90))
FOUND = Detection("star", (10.0, 20.0, 200.0, 150.0))
SAMPLES = [Sample(GREY, "detect star", "<b>", "a & b", [FOUND]), Sample(GREY, "caption en", "same", "same ")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_of_later_steps_are_taken_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = JsonLines(file)
    log.start(0, False)  # there is no file yet
    told = [(0, {"val_loss": 2.0}), (10, {"loss": float("nan")}), (10, {"val_loss": 1.0}), (20, {"loss": 0.5})]
    for step, values in told:
        log.numbers(step, values)
    assert lines(file)[1] == {"step": 10, "loss": None} and len(lines(file)) == 4
    with file.open("a") as half:
        half.write('{"step": 2')  # killed while it wrote
    log.start(10, True)
    assert [line["step"] for line in lines(file)] == [0, 10, 10]
    log.start(10, False)  # its validation is made again
    assert lines(file) == [{"step": 0, "val_loss": 2.0}, {"step": 10, "loss": None}]
    log.start(0, False)
    assert lines(file) == []


def test_sample_pages_show_pictures_and_texts(tmp_path):
    pages = SamplePages(tmp_path / "samples")
    pages.start(0, False)
    for step in (0, 10, 20):
        pages.samples(step, SAMPLES)
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {"step_000000.html", "step_000010.html", "step_000020.html"}
    page = (tmp_path / "samples" / "step_000010.html").read_text()
    assert page == to_html("step 10", SAMPLES)
    assert "a &amp; b" in page and "&lt;b&gt;" in page and page.count("data:image/png;base64,") == 2
    assert page.index('class="other"') < page.index('class="same"')
    assert "(empty)" in to_html("", [Sample(GREY, "detect star", "<b>", "")])
    pages.start(10, True)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == names - {"step_000020.html"}
    pages.start(10, False)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_000000.html"}


def test_objects_are_drawn_on_a_small_picture():
    drawn = SAMPLES[0].drawn()
    assert drawn.size == (320, 160) and drawn.tobytes() != SAMPLES[1].drawn().tobytes()
    assert GREY.size == (400, 200)


def test_tensorboard_gets_scalars_pictures_and_texts(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401  the format that is read below

    log = TensorBoard(tmp_path)
    log.start(0, False)
    log.numbers(10, {"loss": 0.5, "val_exact": 1.0, "val_recall": float("nan")})
    log.samples(10, SAMPLES)
    log.close()
    [file] = tmp_path.iterdir()
    data, tags = file.read_bytes(), set()
    while data:  # length u64, crc u32, event, crc u32
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        tags |= {value.tag for value in event.summary.value}
        data = data[16 + size :]
    assert {"train/loss", "val/exact", "samples/0", "samples/1"} <= tags and "val/recall" not in tags


class _FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged = settings, []

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


def test_wandb_is_offline_and_goes_on_with_its_run(tmp_path, monkeypatch):
    runs = []
    fake = types.SimpleNamespace(
        init=lambda **settings: runs.append(_FakeRun(**settings)) or runs[-1],
        Image=lambda picture, caption: (picture.size, caption),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for step in (0, 10, 0):
        log = Wandb(tmp_path / "wandb", "cats")
        log.start(step, bool(step))
        log.numbers(step + 5, {"loss": 0.5, "val_exact": 1.0})
        log.samples(step + 5, SAMPLES[1:])
        log.close()
    first, again, anew = (run.settings for run in runs)
    assert first["mode"] == "offline" and first["name"] == "cats" and first["resume"] == "allow"
    assert first["id"] == again["id"] != anew["id"]
    picture = ((320, 160), "caption en → same  (expected: same)")
    assert runs[0].logged == [(5, {"train/loss": 0.5, "val/exact": 1.0}), (5, {"samples": [picture]}), "finished"]
    monkeypatch.setenv("WANDB_MODE", "online")
    Wandb(tmp_path / "wandb", "cats").start(10, True)
    assert runs[-1].settings["mode"] == "online"


@pytest.mark.parametrize("log, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, log, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"log={log} needs {package}: pip install -e"):
        make_loggers(tmp_path, log)
    assert not list(tmp_path.iterdir())


def test_kinds_of_logs(tmp_path):
    assert kinds(" wandb ; tensorboard; wandb ") == ["wandb", "tensorboard"] and kinds("") == []
    with pytest.raises(ConfigError, match="'tensorbord' is not one of tensorboard, wandb"):
        kinds("tensorbord")
    assert [type(log) for log in make_loggers(tmp_path)] == [JsonLines, SamplePages]
