"""config.run=serve: what its keys tell the engine and the server; a real one, with the clients of others."""

import sys
from pathlib import Path

import pytest

import paligemma_jax as pj
from paligemma_jax.errors import CheckpointError
from paligemma_jax.runs import model as models
from paligemma_jax.serving.engine import EngineSettings

ROOT = Path(__file__).resolve().parents[2]


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
    """checkpoint, adapter, dtype, quantization, mask_vae, mesh and num_slots."""
    keys = {"checkpoint": tmp_path, "dtype": "bfloat16", "quantization": "int8", "mask_vae": tmp_path / "m.npz"}
    status, _, told = serve(**keys, adapter="org/lora", num_slots=3, mesh="auto")
    assert status == 0 and told["load"]["mesh"] == "auto"
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
