"""POST /v1/chat/completions, as OpenAI's clients send it."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from fastapi import APIRouter, Request, Response

from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.http import logprobs
from paligemma_jax.serving.http.asking import Asked, Asking, ImageUrl, check_tokens, content_of, prompt_of, wanted_of
from paligemma_jax.serving.http.bodies import Body, Json, read, takes
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.formats import ObjectFormat, SchemaFormat, TextFormat, form_of
from paligemma_jax.serving.http.service import Answer, Service, cancel
from paligemma_jax.serving.http.streams import DONE, EventStream, data

MOST_STOPS = 4
FINISHED = {"eos": "stop", "stop": "stop", "length": "length"}

Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, pydantic.Field(discriminator="type")]
Stop = Annotated[str, pydantic.Field(min_length=1, max_length=256)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: str | ImageUrl


class Message(Body):
    role: str
    content: str | list[Annotated[TextPart | ImagePart, pydantic.Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # there is none


class ChatRequest(Asking):
    without_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "presence_penalty": (0, 0.0),
        "frequency_penalty": (0, 0.0),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    messages: list[Message]
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    n: int = pydantic.Field(1, ge=1)
    stop: Stop | list[Stop] | None = None
    logprobs: bool = False
    stream_options: StreamOptions | None = None
    response_format: Format | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a prompt about one picture or several."""
        body = await read(request, ChatRequest, service.settings)
        asked = await _asked(service, body)
        completion = _Completion(service, body, asked)
        if body.stream:
            answers = await service.submit(request, asked.wanted)
            return EventStream(completion.stream(answers), lambda: cancel(answers))
        return Json(await completion.whole(await service.results(request, asked.wanted)))

    return router


async def _asked(service: Service, body: ChatRequest) -> Asked:
    """What a request asks; ApiError where it cannot be done."""
    service.check_model(body.model)
    settings = service.settings
    texts, urls = _parts(body.messages)
    prompt = prompt_of(texts, "messages[0].content")
    if not urls:
        raise ApiError(400, "there is no picture: send one as an image_url part of the message", "messages[0].content")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: send one of them", "max_tokens")
    check_tokens(service, body.max_tokens, "max_tokens")
    check_tokens(service, body.max_completion_tokens, "max_completion_tokens")
    if body.n > settings.max_n:
        raise ApiError(400, f"n={body.n} is too many: at most {settings.max_n}", "n")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MOST_STOPS:
        raise ApiError(400, f"{len(stops)} stop strings are too many: at most {MOST_STOPS}", "stop")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options need stream=true", "stream_options")
    form = form_of(body.response_format, prompt, "response_format")
    for name, given in (("logprobs", body.logprobs), ("stop", stops)):
        if form is not None and given:
            raise ApiError(400, f"{name} are of the model's text: not with a response_format of JSON", name)
    loaded = await service.load(urls)
    count = body.max_completion_tokens or body.max_tokens
    return Asked(prompt, loaded, wanted_of(service, body, prompt, loaded, form, count, body.n, stops), form)


def _parts(messages: Sequence[Message]) -> tuple[list[str], list[tuple[str, str]]]:
    """The texts of the only message, and the pictures with where they stand."""
    content = content_of(messages, "messages")
    if isinstance(content, str):
        return [content], []
    texts: list[str] = []
    urls: list[tuple[str, str]] = []
    for number, part in enumerate(content):
        if isinstance(part, TextPart):
            texts.append(part.text)
        else:
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            urls.append((url, f"messages[0].content[{number}].image_url"))
    return texts, urls


class _Completion:
    """One chat completion, whole or in chunks."""

    def __init__(self, service: Service, body: ChatRequest, asked: Asked):
        self._service, self._body, self._asked = service, body, asked
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    async def whole(self, ends: Sequence[Finished]) -> dict[str, Any]:
        choices = []
        for index, end in enumerate(ends):
            message = {"role": "assistant", "content": await self._asked.text(self._service, end), "refusal": None}
            scores = self._logprobs(end.output.tokens, end.output.logprobs, end.top)
            finished = {"finish_reason": FINISHED[end.reason], "logprobs": scores}
            choices.append({"index": index, "message": message} | finished)
        return self._common | {"object": "chat.completion", "choices": choices, "usage": self._usage(ends)}

    async def stream(self, answers: Sequence[Answer]) -> AsyncIterator[str]:
        """Chunks; JSON comes in one, when it is known."""
        for index in range(len(answers)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        ends: list[Finished] = []
        async for index, event in self._service.events(answers):
            if isinstance(event, Finished):
                ends.append(event)
                if self._asked.form is not None:
                    yield self._chunk(index, {"content": await self._asked.text(self._service, event)})
                yield self._chunk(index, {}, finish_reason=FINISHED[event.reason])
            elif self._asked.form is None and (event.text or (self._body.logprobs and len(event.tokens))):
                scores = self._logprobs(event.tokens, event.logprobs, event.top)
                yield self._chunk(index, {"content": event.text}, scores)
        if self._with_usage:
            yield data(self._common | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(ends)})
        yield DONE

    @property
    def _with_usage(self) -> bool:
        return self._body.stream_options is not None and self._body.stream_options.include_usage

    def _chunk(self, index: int, delta: dict[str, Any], scores: Any = None, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish_reason}
        usage = {"usage": None} if self._with_usage else {}
        return data(self._common | {"object": "chat.completion.chunk", "choices": [choice]} | usage)

    def _logprobs(self, *scored: Any) -> dict[str, Any] | None:
        """Of tokens, their log-probabilities and the most likely ones, where they are asked for."""
        if not self._body.logprobs:
            return None
        return {"content": logprobs.written(self._service.model.processor.tokenizer, *scored), "refusal": None}

    def _usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        request = self._asked.wanted[0].request
        prompt = self._service.prompt_tokens(request)
        completion = sum(len(end.output.tokens) for end in ends)
        details = {"cached_tokens": 0, "image_tokens": self._service.image_tokens(request)}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": details,
        }
