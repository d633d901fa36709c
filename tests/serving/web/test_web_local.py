"""Models of this process: one takes the place of another, and one that fails does not."""

import threading
import time

import pytest

from paligemma_jax.errors import CheckpointError, Closed, ConfigError, EngineFailed
from paligemma_jax.serving.settings import EngineSettings
from paligemma_jax.serving.web import local
from paligemma_jax.serving.web.local import Local
from paligemma_jax.serving.web.snippets import Source


class Model:
    def __init__(self, name):
        self.name = name
        self.processor = type("Processor", (), {"tokenizer": None})


class FakeEngine:
    """Ready when its gate is open."""

    gate = threading.Event()
    failing = ()
    made = ()

    def __init__(self, model, settings):
        self.model, self.ready, self.closed = model, False, None
        self.made.append(self)

    def start(self, early=False):
        pass

    def wait_ready(self):
        assert self.gate.wait(10)
        if self.model.name in self.failing:
            raise EngineFailed("the engine did not start: x")
        self.ready = True

    def close(self, drain_s=0.0):
        self.closed = drain_s


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(local, "Engine", FakeEngine)
    monkeypatch.setattr(local, "_END_S", 0.05)
    monkeypatch.setattr(FakeEngine, "gate", threading.Event())
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(FakeEngine, "failing", ("bad engine",))
    return FakeEngine


def load(source):
    if source.checkpoint == "missing":
        raise CheckpointError("missing does not exist: give\na directory")
    if source.checkpoint == "odd":
        raise ValueError("odd things")
    return Model(source.checkpoint)


def until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_first_model_takes_requests_while_it_is_made_ready(engines):
    backend = Local(load, EngineSettings())
    with pytest.raises(CheckpointError, match="no model is loaded"):
        backend.served()
    backend.load(Source("one"))
    until(lambda: backend.served() is not None)
    assert backend.status().state == "warming" and backend.status().name == "one"
    engines.gate.set()
    backend._thread.join()
    assert backend.status().state == "ready" and backend.served().model.name == "one"


def test_the_old_model_answers_until_the_new_one_is_ready(engines):
    after = []
    backend = Local(load, EngineSettings(), after=lambda model: after.append(model.name))
    engines.gate.set()
    backend.load(Source("one"))
    backend._thread.join()
    engines.gate.clear()
    backend.load(Source(" two "))
    with pytest.raises(ConfigError, match="two is being loaded"):
        backend.load(Source("three"))
    assert backend.served().model.name == "one" and "loading two" in backend.status().news
    assert backend.status().state == "ready"
    engines.gate.set()
    backend._thread.join()
    assert backend.served().model.name == "two" and backend.status().news == ""
    assert [engine.closed for engine in engines.made] == [local._DRAIN_S, None] and after == ["one", "two"]


@pytest.mark.parametrize(
    "name, says", [("missing", "does not exist"), ("odd", "odd could not"), ("bad engine", "start")]
)
def test_a_model_that_fails_takes_nobodys_place(engines, name, says):
    engines.gate.set()
    backend = Local(load, EngineSettings())
    backend.load(Source("one"))
    backend._thread.join()
    backend.load(Source(name))
    backend._thread.join()
    status = backend.status()
    assert backend.served().model.name == "one" and status.state == "ready"
    assert says in status.news and "\n" not in status.news and status.is_error
    assert engines.made[0].closed is None and all(engine.closed is not None for engine in engines.made[1:])
    backend.load(Source("two"))
    backend._thread.join()
    assert backend.served().model.name == "two" and not backend.status().is_error


@pytest.mark.parametrize("name", ["missing", "odd", "bad engine"])
def test_a_first_model_that_fails_is_said(engines, name):
    engines.gate.set()
    backend = Local(load, EngineSettings())
    backend.load(Source(name))
    backend._thread.join()
    assert backend.status().state == "failed" and backend.status().is_error
    with pytest.raises(CheckpointError, match="no model is loaded: "):
        backend.served()


def test_where_others_come_models_cannot_be_chosen(engines):
    engines.gate.set()
    backend = Local(load, EngineSettings(), can_load=False)
    backend.load(Source("one"))
    backend._thread.join()
    with pytest.raises(ConfigError, match="cannot be chosen"):
        backend.load(Source("two"))


def test_a_model_that_comes_after_the_end_is_closed(engines):
    backend = Local(load, EngineSettings())
    backend.load(Source("one"))
    until(lambda: backend.served() is not None)
    backend.close()
    engines.gate.set()
    backend._thread.join()
    assert engines.made[0].closed is not None and backend.close()
    with pytest.raises(Closed):
        backend.load(Source("two"))


def test_no_name_is_said(engines):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Local(load, EngineSettings()).load(Source(" "))
