"""POST /v1/responses, as OpenAI's clients send it: one answer, kept nowhere."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from fastapi import APIRouter, Request, Response

from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.http.asking import Asked, Asking, check_tokens, content_of, prompt_of, wanted_of
from paligemma_jax.serving.http.bodies import Body, Json, read, takes
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.formats import FlatSchemaFormat, ObjectFormat, TextFormat, form_of
from paligemma_jax.serving.http.service import Answer, Service, cancel
from paligemma_jax.serving.http.streams import EventStream, data


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
        "include": ([],),
        "service_tier": ("auto", "default"),
    }

    input: str | list[Item]
    max_output_tokens: int | None = pydantic.Field(None, ge=1)
    text: Text | None = None


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
            "output": [] if end is None else [self._message(text, status)],
            "parallel_tool_calls": False,
            "temperature": self._body.temperature,
            "tool_choice": "none",
            "tools": [],
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
        empty = self._message("", "in_progress") | {"content": []}
        yield event("response.output_item.added", output_index=0, item=empty)
        yield event("response.content_part.added", **place, part=_part(""))
        async for _, news in self._service.events(answers):
            if not isinstance(news, Finished):
                if news.text and self._asked.form is None:
                    yield event("response.output_text.delta", **place, delta=news.text, logprobs=[])
                continue
            text = await self._asked.text(self._service, news)
            status = "incomplete" if news.reason == "length" else "completed"
            if self._asked.form is not None:
                yield event("response.output_text.delta", **place, delta=text, logprobs=[])
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=_part(text))
            yield event("response.output_item.done", output_index=0, item=self._message(text, status))
            yield event(f"response.{status}", response=self.whole(news, text))

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}

    def _usage(self, end: Finished) -> dict[str, Any]:
        prompt, answer = self._service.prompt_tokens(self._asked.wanted[0].request), len(end.output.tokens)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
