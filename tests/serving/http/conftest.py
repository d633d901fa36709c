"""A server whose engine says what a test wants: the interface of `serving.engine`, canned answers."""

import base64
import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import Cancelled, CheckpointError
from paligemma_jax.serving.events import Event, Finished, Piece, Stats
from paligemma_jax.serving.http.app import make_app
from paligemma_jax.serving.http.server import Server, listen
from paligemma_jax.serving.http.service import Service
from paligemma_jax.serving.http.settings import HttpSettings
from paligemma_jax.serving.shown import TopLogprobs
from paligemma_jax.tasks.confidence import read_objects
from paligemma_jax.tasks.segmentation import attach_masks

NAME = "shapes"


class FakeAnswer:
    """Words one by one, then the end; a held one stops after the first word until it is released or cancelled."""

    def __init__(self, events: Sequence[Event | BaseException], held: bool):
        self._lock = threading.RLock()
        self._callbacks: list[Callable[[Event | BaseException], None]] = []
        self._told: list[Event | BaseException] = []
        self._left = list(events)
        self.cancelled = threading.Event()
        self.tell(1 if held else len(self._left))

    def tell(self, count: int) -> None:
        with self._lock:
            news, self._left = self._left[:count], self._left[count:]
            self._told += news
            for event in news:
                for callback in self._callbacks:
                    callback(event)

    def release(self) -> None:
        self.tell(len(self._left))

    def on_event(self, callback: Callable[[Event | BaseException], None]) -> None:
        with self._lock:
            self._callbacks.append(callback)
            for event in self._told:
                callback(event)

    def cancel(self) -> None:
        with self._lock:
            if self._left:
                self.cancelled.set()
                self._left = [Cancelled("cancelled")]
                self.release()


class FakeEngine:
    """say: makes the answer's text of a request, or the error that ends it; reason: why it ends.

    refusal: an error, or function that makes one of the request, for `submit` to raise.
    held: answers stop after a word.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.ready = True
        self.say: Callable[[pj.Request], str | BaseException] = lambda request: "a red circle"
        self.reason = "eos"
        self.refusal: Any = None
        self.held = False
        self.requests: list[pj.Request] = []
        self.asked: list[dict[str, Any]] = []
        self.answers: list[FakeAnswer] = []

    def submit(
        self,
        request: pj.Request,
        *,
        client: str = "",
        timeout_s: float | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> FakeAnswer:
        refusal = self.refusal(request) if callable(self.refusal) else self.refusal
        if refusal is not None:
            raise refusal
        self.requests.append(request)
        self.asked.append({"client": client, "timeout_s": timeout_s, "stop": stop})
        self.answers.append(FakeAnswer(self._events(self.say(request), top_logprobs), self.held))
        return self.answers[-1]

    def stats(self) -> Stats:
        return Stats(2, 3, 14, {"eos": 7}, 0, 100, 160, 40, 5, 1, 5, 1000)

    def _events(self, said: str | BaseException, num_top: int = 0) -> list[Event | BaseException]:
        if isinstance(said, BaseException):
            return [said]
        words = [f"{' ' * (i > 0)}{word}" for i, word in enumerate(said.split(" "))]
        pieces = [np.array(self._tokenizer.encode(word), np.int32) for word in words]
        events: list[Event | BaseException] = [
            Piece(word, ids, np.full(len(ids), -0.5, np.float32), self._top(ids, num_top))
            for word, ids in zip(words, pieces, strict=True)
        ]
        tokens = np.concatenate([*pieces, [self._tokenizer.eos_id] if self.reason == "eos" else []]).astype(np.int32)
        half = np.full(len(tokens), 0.5, np.float32)
        finish = "eos" if self.reason == "stop" else self.reason
        timing = pj.Timing(0.0, 1.0, 1.0, len(tokens))
        output = pj.Output(said, tokens, np.full(len(tokens), -0.5, np.float32), finish, timing, half, half)
        return [*events, Finished(output, self.reason, 0.01, 0.02, 0.1, self._top(tokens, num_top))]

    def _top(self, ids: np.ndarray, count: int) -> TopLogprobs | None:
        """The token itself and then <eos> again and again, each half as likely as the one before."""
        if not count:
            return None
        found = np.full((len(ids), count), self._tokenizer.eos_id, np.int32)
        found[:, 0] = ids
        return TopLogprobs(found, -np.arange(1, count + 1, dtype=np.float32) * np.ones((len(ids), 1)))


class StandIn:
    """What the routes use of a model, without a network; a mask fills the left half of its box."""

    def __init__(self, model: pj.PaliGemma):
        self.config, self.processor = model.config, model.processor
        self.has_masks = True

    def objects(self, output, size, loc_scale=1023, masks=True, labels=()):
        found, dropped = read_objects(output, self.processor.tokenizer, size, loc_scale, labels)
        left = np.where(np.arange(64) < 32, 1.0, -1.0) * np.ones((64, 1))
        return (attach_masks(found, size, lambda codes: np.stack([left] * len(codes))) if masks else found), dropped

    def mask_decoder(self) -> None:
        if not self.has_masks:
            raise CheckpointError("masks need vae-oid.npz")

    def embed_image(self, images: Sequence[Image.Image], projected: bool = True) -> np.ndarray:
        width = 3 if projected else 2
        return np.stack([np.arange(4 * width).reshape(4, width) + np.asarray(image).mean() for image in images])


@pytest.fixture(scope="session")
def stand_in(make_model) -> StandIn:
    return StandIn(make_model("gemma2"))


@pytest.fixture(scope="session")
def _default(stand_in) -> Iterator[tuple[FakeEngine, TestClient, Service]]:
    engine = FakeEngine(stand_in.processor.tokenizer)
    service = Service(engine, stand_in, HttpSettings(NAME))
    with TestClient(make_app(service), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield engine, client, service


@pytest.fixture
def engine(_default) -> FakeEngine:
    """The engine of `client`, as it is at first."""
    _default[0].reset()
    return _default[0]


@pytest.fixture
def client(_default, engine) -> TestClient:
    """A client of a server with the default settings."""
    return _default[1]


@pytest.fixture(scope="session")
def closed(stand_in) -> Iterator[TestClient]:
    """A client of a server with the keys "other" and "secret"."""
    service = Service(FakeEngine(stand_in.processor.tokenizer), stand_in, HttpSettings(NAME, keys=("other", "secret")))
    with TestClient(make_app(service), base_url="http://anything", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client_with(stand_in):
    """client_with(engine=None, **settings): a client of a server with other settings."""
    with contextlib.ExitStack() as stack:

        def make(engine: FakeEngine | None = None, **settings: Any) -> TestClient:
            engine = engine or FakeEngine(stand_in.processor.tokenizer)
            service = Service(engine, stand_in, HttpSettings(NAME, **settings))
            app = make_app(service)
            host = settings.pop("base_url", "http://localhost")
            return stack.enter_context(TestClient(app, base_url=host, raise_server_exceptions=False))

        yield make


@dataclasses.dataclass
class Live:
    """A server with a fake engine at a real socket."""

    port: int
    engine: FakeEngine
    service: Service
    server: Server
    thread: threading.Thread


@pytest.fixture
def live(stand_in):
    """live(**settings): a `Live` server, which ends with the test."""
    started: list[Live] = []

    def start(**settings: Any) -> Live:
        engine = FakeEngine(stand_in.processor.tokenizer)
        service = Service(engine, stand_in, HttpSettings(NAME, port=0, **settings))
        sock = listen(service.settings)
        config = uvicorn.Config(
            make_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        server = Server(config, service)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        started.append(Live(sock.getsockname()[1], engine, service, server, thread))
        until(lambda: server.started)
        return started[-1]

    yield start
    for each in started:
        each.server.should_exit = True
        each.thread.join(10)
        assert not each.thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def data_uri(image: Image.Image | None = None, kind: str = "png") -> str:
    """A picture, 40 x 20 by default, as requests hold it."""
    file = io.BytesIO()
    (image or Image.new("RGB", (40, 20), (200, 0, 0))).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(prompt: str = "caption en", url: Any = None, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    picture = {"type": "image_url", "image_url": {"url": data_uri()} if url is None else url}
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": [picture, {"type": "text", "text": prompt}]}],
    } | fields


def refused(response: Any, status: int = 400, param: str | None = None) -> str:
    """The message of an error in OpenAI's form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert param is None or response.json()["error"]["param"] == param, response.text
    return response.json()["error"]["message"]


@pytest.fixture
def helpers():
    """Functions that several files of tests use."""
    return Helpers()


class Helpers:
    name = NAME
    data_uri = staticmethod(data_uri)
    chat = staticmethod(chat)
    refused = staticmethod(refused)
    until = staticmethod(until)
