"""config.run=ui: what its keys tell the page, the engine and the model; and that the page's calls give its answers."""

import contextlib
import shlex
import socket
from pathlib import Path

import pytest

import paligemma_jax as pj
from paligemma_jax.runs import model as models
from paligemma_jax.runs import ui
from paligemma_jax.serving.engine import Engine
from paligemma_jax.serving.settings import EngineSettings
from paligemma_jax.serving.web import snippets
from paligemma_jax.serving.web.local import Local, OnEngine
from paligemma_jax.serving.web.questions import Question, prompt_of, read_picture
from paligemma_jax.serving.web.snippets import Source

ROOT = Path(__file__).resolve().parents[2]
TINY, SHAPES = "assets/tiny", "assets/examples/shapes.png"


class FakeEngine:
    ready = True

    def __init__(self, model, settings):
        self.model, self.settings = model, settings

    def start(self, early=False):
        pass

    def wait_ready(self):
        pass

    def close(self, drain_s=0.0):
        pass


@pytest.fixture
def told(main, monkeypatch, loaded_with):
    """told(KEY=VALUE, ...): exit status, stderr, and what was told to whom; no model is loaded, nothing is served."""
    seen = {}

    def serve(config, sock, backend):
        with contextlib.suppress(AttributeError):
            backend._thread.join(10)
        seen.update(config=config, backend=backend, address=sock.getsockname(), status=backend.status())

    def local(load, settings, *rest):
        seen["engine"] = settings
        return Local(load, settings, *rest)

    monkeypatch.setattr(ui, "_serve", serve)
    monkeypatch.setattr(ui, "_check_files", lambda checkpoint: None)
    monkeypatch.setattr(ui, "Local", local)

    def run(**keys):
        seen.clear()
        loaded_with.clear()
        keys = {"port": 0, "compilation_cache": False} | keys
        status, _, err = main("--config=configs/ui.py", *(f"--config.{key}={value}" for key, value in keys.items()))
        return status, err, dict(seen) | {"load": loaded_with}

    return run


def test_what_is_loaded_and_for_how_many(told, tmp_path):
    """checkpoint, adapter, dtype, quantization, mask_vae, loc_scale and num_slots."""
    keys = {"checkpoint": tmp_path, "dtype": "bfloat16", "quantization": "int8", "mask_vae": tmp_path / "m.npz"}
    status, _, seen = told(**keys, adapter="org/lora", num_slots=3, loc_scale=1024)
    assert status == 0
    [load] = seen["load"]
    assert load["path"] == str(tmp_path) and load["mask_vae"] == str(tmp_path / "m.npz")
    assert load["dtype"] == "bfloat16" and load["quantization"] == "int8"
    assert load["adapter"] == "org/lora" and load["batch_size"] == 3
    assert seen["status"].state == "failed" and seen["status"].news == "enough"


def test_the_source_is_told_to_the_calls(told, monkeypatch):
    """loc_scale and resample."""
    monkeypatch.setattr("paligemma_jax.serving.web.local.Engine", FakeEngine)
    monkeypatch.setattr(models, "load", lambda config, **options: seen_config.append(config.resample) or "a model")
    monkeypatch.setattr("paligemma_jax.serving.web.local.OnEngine", lambda engine, source: Found(engine, source))

    class Found:
        def __init__(self, engine, source):
            self.engine, self.source = engine, source

    seen_config = []
    seen = told(loc_scale=1024, resample="bilinear")[2]
    assert seen_config == ["bilinear"]
    assert seen["backend"].served().source == Source(seen["config"].checkpoint, resample="bilinear", loc_scale=1024)


def test_what_the_engine_is_told(told):
    """max_waiting, max_new_tokens, max_prompt_tokens, cache_bytes and num_steps."""
    names = ("num_slots", "max_waiting", "max_new_tokens", "max_prompt_tokens", "cache_bytes", "num_steps")
    values = {name: number for number, name in enumerate(names, 3)}
    assert told(**values)[2]["engine"] == EngineSettings(**values, max_images=1)


def test_a_server_is_asked_instead(told):
    """server, api_key and loc_scale."""
    backend = told(server="http://127.0.0.1:9/", api_key="secret", loc_scale=1024)[2]["backend"]
    assert backend.source == Source("", server="http://127.0.0.1:9", loc_scale=1024, needs_key=True)
    assert backend._key == "secret" and backend.model is None and not backend.can_load


def test_models_are_chosen_only_where_nobody_else_comes(told):
    """host and share."""
    assert told()[2]["backend"].can_load
    assert not told(host="0.0.0.0")[2]["backend"].can_load
    assert not told(share=True)[2]["backend"].can_load
    assert told(host="127.0.0.2")[2]["address"][0] == "127.0.0.2"


def test_which_page_is_made(monkeypatch, told):
    """simple, image, seed and share."""
    pytest.importorskip("gradio")
    from paligemma_jax.serving.web import page, server, simple

    made = []
    serve = ui._serve
    monkeypatch.undo()
    for name, module in (("full", page), ("simple", simple)):
        monkeypatch.setattr(module, "make", lambda *args, name=name, load_pair=None: made.append((name, *args[1:])))
    monkeypatch.setattr(server, "make_app", lambda *args: made.append(args[1:]))
    monkeypatch.setattr(server, "serve", lambda app, sock: None)
    monkeypatch.setattr(server, "share", lambda port: made.append(port) or "https://x")
    assert serve is not ui._serve
    from configs import ui as configs

    for keys in ({}, {"simple": True, "image": "b.png", "share": True, "max_new_tokens": 9, "seed": 3}):
        config = configs.get_config()
        config.update(keys)
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as sock:
            ui._serve(config, sock, None)
            port = sock.getsockname()[1]
    assert made == [
        *(("full", configs.get_config().image, 256, 0), (configs.get_config().image, True)),
        *(("simple", "b.png", 9, 3), port, ("b.png", False)),
    ]


@pytest.mark.parametrize("keys", [{}, {"student": "nowhere"}, {"clip": ""}, {"student": ""}])
def test_phrases_are_shown_by_the_pair_that_is_named(keys):
    """student and clip."""
    pytest.importorskip("gradio")
    from configs import ui as configs
    from paligemma_jax.serving.web.phrases import heat_maps

    config = configs.get_config()
    config.update(keys)
    load = ui._pair(config)
    assert (load is None) == ("" in keys.values())
    if keys == {}:
        found = heat_maps(load, SHAPES, "red circle ; star")
        assert [name for _, name in found] == ["red circle", "star"] and found[0][0].size == (502, 417)
        assert load() is load()
        with pytest.raises(pj.UserError, match="there are no phrases"):
            heat_maps(load, SHAPES, " ; ")
        with pytest.raises(pj.UserError, match="there is no picture"):
            heat_maps(load, None, "star")
    elif load:
        with pytest.raises(pj.UserError, match="nowhere"):
            load()


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"port": 99999}, "port=99999"),
        ({"host": "203.0.113.1"}, "host=203.0.113.1"),
        ({"server": "localhost:8000"}, "server='localhost:8000'"),
        ({"checkpoint": ""}, "no checkpoint"),
        ({"num_slots": 0}, "num_slots=0"),
        ({"loc_scale": 7}, "loc_scale=7"),
    ],
)
def test_what_cannot_be_is_one_line(told, keys, says):
    status, err, _ = told(**keys)
    assert status == 1 and says in err and err.count("\n") == 1


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "."])
def test_a_path_that_is_no_model_ends_the_run(main, path):
    status, _, err = main("--config=configs/ui.py", "--config.port=0", f"--config.checkpoint={path}")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1


def test_a_port_that_is_taken_is_said(told):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as sock:
        status, err, _ = told(port=sock.getsockname()[1])
    assert status == 1 and "port=" in err and err.count("\n") == 1


def test_without_gradio_it_is_said_what_to_install(told, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, err, _ = told()
    assert status == 1 and '".[ui]"' in err


@pytest.mark.slow
def test_the_calls_give_the_answer_of_the_engine(main, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = pj.load(TINY, dtype="float32", batch_size=2)
    engine = Engine(model, EngineSettings(num_slots=2, max_new_tokens=100, max_prompt_tokens=32, max_images=1))
    engine.start()
    served = OnEngine(engine, Source(TINY))
    picture = read_picture(SHAPES)
    try:
        for prompt, options in (
            (prompt_of("caption"), pj.GenerateOptions()),
            (prompt_of("detect", things="circle, star"), pj.GenerateOptions(constrain=True)),
            (prompt_of("question", question='what\'s 100% "red"?'), pj.GenerateOptions(20, pj.Sampling(1.5, seed=4))),
        ):
            asked = Question(picture, SHAPES, prompt, options)
            text = served.ask(asked, "").result().output.text
            arguments = shlex.split(snippets.command(served.source, asked).replace("\\\n", " "))[2:]
            status, said, _ = main(*arguments, "--config.compilation_cache=False")
            assert (status, said) == (0, f"{text}\n")
            exec(snippets.python(served.source, asked), {})
            assert capsys.readouterr().out == f"{text}\n"
    finally:
        engine.close()
