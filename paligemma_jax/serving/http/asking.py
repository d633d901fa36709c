"""The fields that chat completions and responses share, and what they ask of the engine."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.http.bodies import Body, to_json
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.formats import Form
from paligemma_jax.serving.http.service import Service, Wanted, request_of
from paligemma_jax.serving.shown import MOST_TOP
from paligemma_jax.tasks.prompts import Prompt, read_prompt

USUAL_TOKENS = 256  # of an answer, where the request does not say
MOST_LETTERS = 16_384  # of a prompt

Seed = Annotated[int, pydantic.Field(ge=0, le=2**32 - 1)]


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"  # a picture always gets the model's one size


class Asking(Body):
    """Sampling and what says nothing about the answer."""

    model: str | None = None
    temperature: float = pydantic.Field(0.0, ge=0, le=2)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    top_k: int = pydantic.Field(0, ge=0, le=2**31 - 1)
    min_p: float = pydantic.Field(0.0, ge=0, le=1)
    seed: Seed | None = None
    constrain: bool = False
    top_logprobs: int = pydantic.Field(0, ge=0, le=MOST_TOP)
    stream: bool = False
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that is understood: a prompt about pictures, how it is answered, and the form of the answer."""

    prompt: Prompt
    loaded: list[Image.Image]
    wanted: list[Wanted]
    form: Form | None

    async def text(self, service: Service, event: Finished) -> str:
        """The answer's text, in the form that is asked for."""
        if self.form is None:
            return event.output.text
        size = self.loaded[0].size
        return to_json(self.form.write(await service.objects(event, size, self.prompt.labels), size))


def content_of(messages: Sequence[Any], field: str) -> Any:
    """What the only message says, which is the user's; ApiError for others. `field` is where they stand."""
    if not messages:
        raise ApiError(400, f"{field} is empty: send a message of role user, with a picture and a text", field)
    for number, message in enumerate(messages):
        if message.role != "user":
            text = f"messages of role {message.role!r:.40} are not supported: the model knows one of role user only"
            raise ApiError(400, text, f"{field}[{number}].role")
    if len(messages) > 1:
        raise ApiError(400, "several messages are not supported: the model knows no conversations", f"{field}[1]")
    return messages[0].content


def prompt_of(texts: Sequence[str], param: str) -> Prompt:
    """The prompt that the text parts of a message make; ApiError for an empty one."""
    text = " ".join(part for part in (text.strip() for text in texts) if part)
    if not text:
        raise ApiError(400, "there is no text: send a prompt such as 'caption en' or 'detect cat'", param)
    if len(text) > MOST_LETTERS:
        raise ApiError(400, f"the prompt has {len(text)} letters: send at most {MOST_LETTERS}", param)
    return read_prompt(text)


def wanted_of(
    service: Service,
    body: Asking,
    prompt: Prompt,
    loaded: Sequence[Image.Image],
    form: Form | None,
    max_tokens: int | None,
    n: int = 1,
    stop: Sequence[str] = (),
) -> list[Wanted]:
    """`n` answers to one prompt, with one seed after the other."""
    most = service.settings.max_new_tokens
    count = min(USUAL_TOKENS, most) if max_tokens is None else max_tokens
    if form is not None and len(loaded) != 1:
        raise ApiError(400, "boxes are of one picture: send a single one", "response_format")
    seed = service.settings.seed if body.seed is None else body.seed
    found = []
    for number in range(n):
        sampling = pj.Sampling(body.temperature, body.top_k, body.top_p, body.min_p, seed=(seed + number) % 2**32)
        options = pj.GenerateOptions(count, sampling, body.constrain or form is not None)
        found.append(Wanted(request_of(loaded, prompt.text, options), tuple(stop), body.top_logprobs))
    return found


def check_tokens(service: Service, count: int | None, param: str) -> None:
    """ApiError for more tokens than the server gives to one answer."""
    if count is not None and count > (most := service.settings.max_new_tokens):
        raise ApiError(400, f"{param}={count} is too many: at most {most}", param)
