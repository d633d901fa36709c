"""Bodies of requests, read within limits, and of responses."""

import asyncio
import json
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from paligemma_jax.errors import shortened
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.settings import HttpSettings

_DEEPEST = 32  # objects and lists in each other
_SHOWN = 80  # characters of a value that a message quotes

SCHEMAS = "#/components/schemas/{model}"


class Body(BaseModel):
    """What a client sends: known fields of the right types only; null is as good as nothing.

    `without_effect` lists values of fields that are not supported with which they ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    without_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: v for key, v in value.items() if v is not None and not cls._asks_for_nothing(key, v)}

    @classmethod
    def _asks_for_nothing(cls, key: str, value: Any) -> bool:
        return any(type(value) is type(nothing) and value == nothing for nothing in cls.without_effect.get(key, ()))


B = TypeVar("B", bound=Body)


def takes(body: type[Body]) -> dict[str, Any]:
    """What the API's description says of a route with this body."""
    schema = {"$ref": SCHEMAS.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read(request: Request, body: type[B], settings: HttpSettings) -> B:
    """The checked body of a request; ApiError for any other than `body` describes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also: web pages cannot send it to other origins unasked
        raise ApiError(415, "send JSON, with the header content-type: application/json")
    value = parse(await _read(request, settings))
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object")
    try:
        return body.model_validate(value)
    except ValidationError as error:
        raise _refused(error, value) from None


def parse(content: bytes) -> Any:
    """JSON that is not deep, and whose numbers are finite."""
    try:
        value = json.loads(content, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {_DEEPEST} levels deep") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # integers of thousands of digits
        raise ApiError(400, "the body has a number that is too long") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for parent in level for item in _children(parent)]
        if not level:
            return value
    raise ApiError(400, f"the body is nested more than {_DEEPEST} levels deep")


async def _read(request: Request, settings: HttpSettings) -> bytes:
    """The bytes of a body. What comes after the limit is read too and forgotten, or clients would not see the error."""
    most, deadline = settings.max_body_bytes, time.monotonic() + settings.body_timeout_s
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), deadline - time.monotonic())
        except TimeoutError:
            if size > most:
                break
            text = f"the body took more than {settings.body_timeout_s:g} s"
            raise ApiError(408, text, code="body_timeout") from None
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client has left")
        size += len(part := message.get("body", b""))
        more = message.get("more_body", False)
        if size > most:
            parts.clear()
        else:
            parts.append(part)
    if size > most:
        raise ApiError(413, f"the body is larger than {most} bytes: send smaller pictures", code="body_too_large")
    return b"".join(parts)


class Json(Response):
    """A response of finite numbers and any text, lone surrogates as question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode("utf-8", "replace")


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _refuse_number(name: str) -> NoReturn:
    raise ApiError(400, f"the body has the number {name}, which JSON has not: give finite numbers")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ApiError(400, f"the body has the number {shortened(text, 20)}: give finite numbers")
    return value


def _refused(error: ValidationError, value: Any) -> ApiError:
    """The error about the field that is deepest in the body: of a union's branches the one that fits best."""
    found = [(*_place(e["loc"], value, e["type"] == "missing"), e) for e in error.errors(include_url=False)]
    _, param, details = max(found, key=lambda item: item[0])
    if details["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported: leave it out", param, "unsupported_parameter")
    if details["type"] == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    message = shortened(details["msg"].removeprefix("Value error, "), 200)
    return ApiError(400, f"{param}: {message}" if param else message, param or None, "invalid_value")


def _place(location: tuple[int | str, ...], value: Any, is_missing: bool) -> tuple[int, str]:
    """How deep a place of a body is, and what it is called; names of types that pydantic puts in are left out."""
    depth, name = 0, ""
    for number, step in enumerate(location, 1):
        is_there = (isinstance(value, dict) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if is_there or (is_missing and number == len(location)):
            depth += 1
            name += f"[{step}]" if isinstance(step, int) else f".{shortened(step, _SHOWN)}"
            value = value[step] if is_there else None
    return depth, name.removeprefix(".")
