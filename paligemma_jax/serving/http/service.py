"""What all routes share: the engine and its model, the settings, and an answer as asyncio sees it."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from fastapi import Request
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import Closed
from paligemma_jax.serving.events import Event, Finished, Stats
from paligemma_jax.serving.http import pictures, warming
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.metrics import Metrics
from paligemma_jax.serving.http.settings import HttpSettings
from paligemma_jax.tasks.prompts import read_prompt

_DECODERS = 4  # pictures and masks that are decoded at once: each may take 200 MB
_FETCHERS = 8

T = TypeVar("T")


class Answer(Protocol):
    """Of `serving.engine`."""

    def cancel(self) -> None: ...
    def on_event(self, callback: Callable[[Event | BaseException], None]) -> None: ...


class Engine(Protocol):
    """Of `serving.engine`: what the routes use of it."""

    ready: bool

    def submit(
        self,
        request: pj.Request,
        *,
        client: str = "",
        timeout_s: float | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> Answer: ...
    def stats(self) -> Stats: ...


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One answer: the request, the texts that end it, and how many of the most likely tokens to tell with each."""

    request: pj.Request
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0


class Service:
    """A model that is served.

    running: requests over HTTP that are being answered.
    draining: no new ones are taken.
    """

    def __init__(self, engine: Engine, model: pj.PaliGemma, settings: HttpSettings):
        self.engine, self.model, self.settings = engine, model, settings
        self.metrics = Metrics(engine.stats)
        self.running = 0
        self.draining = False
        self._warming: threading.Thread | None = None
        self._fetchers = asyncio.Semaphore(_FETCHERS)
        self._decoders = ThreadPoolExecutor(_DECODERS, "paligemma-decoder")
        self._embedders = asyncio.Semaphore(1)

    def warm_up(self) -> None:
        """Run what the engine does not once, in a thread; the server is not ready until that has ended."""
        self._warming = threading.Thread(target=warming.warm_up, args=(self.model,), daemon=True)
        self._warming.start()

    def check_model(self, name: str | None) -> None:
        """ApiError unless it is the model that is served, or none is named."""
        if name is not None and name != self.settings.model_name:
            message = f"there is no model {name!r:.80}: GET /v1/models lists {self.settings.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_ready(self) -> None:
        """ApiError while the programs are not compiled yet, or when the server is about to stop."""
        if self.draining:
            raise Closed("the server is stopping: ask another one")
        if not self.engine.ready or (self._warming is not None and self._warming.is_alive()):
            raise ApiError(503, "the model is being made ready: try again", code="loading", retry_after=5)

    async def load(self, urls: Sequence[tuple[str, str]]) -> list[Image.Image]:
        """Pictures of (URL, name of the field that it stands in)."""
        if len(urls) > self.settings.max_images:
            most = self.settings.max_images
            raise ApiError(400, f"{len(urls)} pictures are too many: send at most {most}", urls[most][1])
        found = []
        for url, param in urls:
            try:
                if pictures.is_fetched(url):
                    async with self._fetchers:  # of their own: they may be slow
                        file = await _in_thread(pictures.content, url, param, self.settings)
                else:
                    file = pictures.content(url, param, self.settings)
                found.append(await self._decode(pictures.decoded, file, param, self.settings))
            except ApiError:
                self.metrics.pictures_refused.inc()
                raise
        return found

    async def submit(self, http: Request, wanted: Sequence[Wanted]) -> list[Answer]:
        """Hand requests to the engine: all or, when one is refused, none."""
        self.check_ready()
        client, answers = http.scope.get("state", {}).get("client", ""), []
        try:
            for item in wanted:
                submit = functools.partial(
                    self.engine.submit,
                    client=client,
                    timeout_s=self.settings.request_timeout_s,
                    stop=item.stop,
                    top_logprobs=item.top_logprobs,
                )
                answers.append(await self._decode(submit, item.request))
        except BaseException:
            cancel(answers)
            raise
        return answers

    async def results(self, http: Request, wanted: Sequence[Wanted]) -> list[Finished]:
        """The ends of all answers, in order; when the client leaves, or one fails, all others are cancelled."""
        answers = await self.submit(http, wanted)
        watcher = asyncio.ensure_future(_when_left(http, answers))
        found: dict[int, Finished] = {}
        try:
            async for index, event in self.events(answers):
                if isinstance(event, Finished):
                    found[index] = event
        finally:
            watcher.cancel()
            if len(found) < len(answers):
                cancel(answers)
        return [found[index] for index in range(len(answers))]

    async def events(self, answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Event]]:
        """What happens to answers, each event with the number of its answer; raises what goes wrong with one."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()

        def tell(index: int, event: Event | BaseException) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        for index, answer in enumerate(answers):
            answer.on_event(functools.partial(tell, index))
        left = len(answers)
        while left:
            index, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Finished):
                left -= 1
                self.metrics.finished(event)
            yield index, event

    async def objects(
        self, event: Finished, size: tuple[int, int], labels: Sequence[str], masks: bool = False
    ) -> list[pj.Detection]:
        """The complete objects of an answer about a picture of `size`, in pixels."""
        find = functools.partial(self.model.objects, masks=masks, labels=labels, loc_scale=self.settings.loc_scale)
        found, _ = await (self._decode if masks else _in_thread)(find, event.output, size)
        return found

    async def _decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what takes much memory in one of few threads that stay: new ones would not reuse what old ones freed."""
        with anyio.CancelScope(shield=True):  # or nobody would cancel an answer that was submitted meanwhile
            call = functools.partial(function, *arguments)
            return await asyncio.get_running_loop().run_in_executor(self._decoders, call)

    async def embed(self, loaded: Sequence[Image.Image], projected: bool) -> Any:
        """Soft tokens or features of pictures, f32 [I, N, D]."""
        self.check_ready()
        async with self._embedders:
            return await _in_thread(functools.partial(_embed, self.model, list(loaded), projected))

    def prompt_tokens(self, request: pj.Request) -> int:
        """Tokens of a request, those of its pictures too."""
        groups = [list(range(len(request.images)))]
        return int(self.model.processor.layout(groups, [request.prompt]).prefix_length[0])

    def image_tokens(self, request: pj.Request) -> int:
        return self.model.config.vision.num_tokens * len(request.images)


def request_of(loaded: Sequence[Image.Image], prompt: str, options: pj.GenerateOptions) -> pj.Request:
    """A request about pictures that are seen together."""
    return pj.Request(tuple(loaded), read_prompt(prompt, len(loaded)), options)


def cancel(answers: Sequence[Answer]) -> None:
    """Stop what still runs of some answers."""
    for answer in answers:
        answer.cancel()


async def _when_left(http: Request, answers: Sequence[Answer]) -> None:
    """Cancel answers when their client closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    cancel(answers)


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    return await anyio.to_thread.run_sync(functools.partial(function, *arguments))


def _embed(model: pj.PaliGemma, loaded: list[Image.Image], projected: bool) -> Any:
    return np.asarray(model.embed_image(loaded, projected=projected)).astype(np.float32)
