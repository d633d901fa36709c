"""POST /v1/responses, as OpenAI's clients send it: one answer, kept nowhere."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from fastapi import APIRouter, Request, Response

from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.http import logprobs
from paligemma_jax.serving.http.asking import Asked, Asking, check_tokens, content_of, prompt_of, wanted_of
from paligemma_jax.serving.http.bodies import Body, Json, read, takes
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.formats import FlatSchemaFormat, ObjectFormat, TextFormat, form_of
from paligemma_jax.serving.http.service import Answer, Service, cancel
from paligemma_jax.serving.http.streams import EventStream, data

_LOGPROBS = "message.output_text.logprobs"  # the one thing that may be included


class InputText(Body):
    type: Literal["input_text"]
    text: str


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"


class Item(Body):
    type: Literal["message"] = "message"
    role: str
    content: str | list[Annotated[InputText | InputImage, pydantic.Field(discriminator="type")]]


class Text(Body):
    without_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, pydantic.Field(discriminator="type")] | None = None


class ResponsesRequest(Asking):
    without_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "store": (False,),
        "background": (False,),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
    }

    input: str | list[Item]
    max_output_tokens: int | None = pydantic.Field(None, ge=1)
    text: Text | None = None
    include: list[Literal[_LOGPROBS]] = pydantic.Field([])


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses", openapi_extra=takes(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """Answer a prompt about one picture or several."""
        body = await read(request, ResponsesRequest, service.settings)
        response = _Response(service, body, asked := await _asked(service, body))
        if body.stream:
            answers = await service.submit(request, asked.wanted)
            return EventStream(response.stream(answers), lambda: cancel(answers))
        [end] = await service.results(request, asked.wanted)
        return Json(response.whole(end, await asked.text(service, end)))

    return router


async def _asked(service: Service, body: ResponsesRequest) -> Asked:
    service.check_model(body.model)
    if isinstance(body.input, str):
        raise ApiError(400, "there is no picture: send input as a list, with an input_image part", "input")
    texts, urls = _parts(body.input)
    prompt = prompt_of(texts, "input[0].content")
    if not urls:
        raise ApiError(400, "there is no picture: send one as an input_image part", "input[0].content")
    check_tokens(service, body.max_output_tokens, "max_output_tokens")
    form = form_of(body.text.format if body.text else None, prompt, "text.format")
    if body.top_logprobs and not body.include:
        raise ApiError(400, f"top_logprobs needs include={[_LOGPROBS]}", "top_logprobs")
    if body.include and form is not None:
        raise ApiError(400, "logprobs are of the model's text: not with a text.format of JSON", "include")
    loaded = await service.load(urls)
    return Asked(prompt, loaded, wanted_of(service, body, prompt, loaded, form, body.max_output_tokens), form)


def _parts(items: Sequence[Item]) -> tuple[list[str], list[tuple[str, str]]]:
    """The texts of the only item, and the pictures with where they stand."""
    content = content_of(items, "input")
    parts = [InputText(type="input_text", text=content)] if isinstance(content, str) else content
    texts = [part.text for part in parts if isinstance(part, InputText)]
    urls = [
        (part.image_url, f"input[0].content[{number}].image_url")
        for number, part in enumerate(parts)
        if isinstance(part, InputImage)
    ]
    return texts, urls


class _Response:
    """One response, whole or event by event."""

    def __init__(self, service: Service, body: ResponsesRequest, asked: Asked):
        self._service, self._body, self._asked = service, body, asked
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = time.time()

    def whole(self, end: Finished | None, text: str = "") -> dict[str, Any]:
        """The response; before its end an empty one in progress."""
        status = "in_progress" if end is None else "incomplete" if end.reason == "length" else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": self._body.metadata or {},
            "model": self._service.settings.model_name,
            "output": [] if end is None else [self._message(status, self._part(text, end))],
            "parallel_tool_calls": False,
            "temperature": self._body.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": self._body.top_logprobs,
            "top_p": self._body.top_p,
            "max_output_tokens": self._body.max_output_tokens,
            "usage": None if end is None else self._usage(end),
        }

    async def stream(self, answers: Sequence[Answer]) -> AsyncIterator[str]:
        number = 0

        def event(kind: str, **fields: Any) -> str:
            nonlocal number
            number += 1
            return data({"type": kind, "sequence_number": number - 1} | fields, kind)

        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield event("response.created", response=self.whole(None))
        yield event("response.in_progress", response=self.whole(None))
        yield event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield event("response.content_part.added", **place, part=self._part(""))
        async for _, news in self._service.events(answers):
            if not isinstance(news, Finished):
                scores = self._logprobs(news.tokens, news.logprobs, news.top)
                if (news.text or scores) and self._asked.form is None:
                    yield event("response.output_text.delta", **place, delta=news.text, logprobs=_brief(scores))
                continue
            text = await self._asked.text(self._service, news)
            status = "incomplete" if news.reason == "length" else "completed"
            if self._asked.form is not None:
                yield event("response.output_text.delta", **place, delta=text, logprobs=[])
            part = self._part(text, news)
            yield event("response.output_text.done", **place, text=text, logprobs=_brief(part["logprobs"]))
            yield event("response.content_part.done", **place, part=part)
            yield event("response.output_item.done", output_index=0, item=self._message(status, part))
            yield event(f"response.{status}", response=self.whole(news, text))

    def _message(self, status: str, *parts: dict[str, Any]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": [*parts]}

    def _part(self, text: str, end: Finished | None = None) -> dict[str, Any]:
        scores = [] if end is None else self._logprobs(end.output.tokens, end.output.logprobs, end.top)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}

    def _logprobs(self, *scored: Any) -> list[dict[str, Any]]:
        """Of tokens, their log-probabilities and the most likely ones, where they are asked for."""
        return logprobs.written(self._service.model.processor.tokenizer, *scored) if self._body.include else []

    def _usage(self, end: Finished) -> dict[str, Any]:
        prompt, answer = self._service.prompt_tokens(self._asked.wanted[0].request), len(end.output.tokens)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        }


def _brief(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events have them: without bytes."""

    def brief(token: dict[str, Any]) -> dict[str, Any]:
        return {name: token[name] for name in ("token", "logprob")}

    return [brief(each) | {"top_logprobs": [brief(other) for other in each["top_logprobs"]]} for each in scores]
