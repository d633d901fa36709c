"""What goes wrong, in OpenAI's form: {"error": {message, type, param, code}}."""

import re
from typing import Any

from paligemma_jax.errors import (
    Busy,
    Cancelled,
    CheckpointError,
    Closed,
    EngineFailed,
    Expired,
    ImageError,
    NumericsError,
    PromptError,
    SamplingError,
    UserError,
    shortened,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_NAMED = re.compile(r"(\w+)=")
_LEFT = 499  # nobody reads it


class ApiError(Exception):
    """An answer other than 200.

    status: of HTTP.
    message: one line.
    param: the field at fault, as in `messages[0].content`.
    code: for programs.
    retry_after: seconds, where trying again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, shortened(message), param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"retry-after": str(self.retry_after)}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; nothing of one that is not its own."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    match error:
        case Busy():
            return ApiError(429, message, code="engine_overloaded", retry_after=1)
        case Closed():
            return ApiError(503, message, code="shutting_down", retry_after=5)
        case Expired():
            return ApiError(504, message, code="timeout")
        case Cancelled():
            return ApiError(_LEFT, message, code="cancelled")
        case EngineFailed():
            return ApiError(500, "the answer could not be generated", code="engine_failed")
        case NumericsError():
            return ApiError(500, "the model's numbers are not finite", code="engine_failed")
        case CheckpointError():  # no mask decoder
            return ApiError(501, message, code="not_there")
        case SamplingError():
            named = _NAMED.match(message)
            return ApiError(400, message, param=named[1] if named else None)
        case PromptError():
            return ApiError(400, message, param="prompt")
        case ImageError():
            return ApiError(400, message, param="image_url")
        case UserError():
            return ApiError(400, message)
    return ApiError(500, "something went wrong in the server: its log says what, under this request's x-request-id")
