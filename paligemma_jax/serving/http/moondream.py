"""POST /v1/caption, /query, /detect, /point and /segment, as moondream's client sends them; boxes are 0 to 1."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pydantic
from fastapi import APIRouter, Request, Response
from PIL import Image

import paligemma_jax as pj
from paligemma_jax.errors import PromptError
from paligemma_jax.serving.events import Finished
from paligemma_jax.serving.http.asking import USUAL_TOKENS, check_tokens, prompt_of
from paligemma_jax.serving.http.bodies import Body, Json, read, takes
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.formats import VALUES
from paligemma_jax.serving.http.outlines import svg_path
from paligemma_jax.serving.http.service import Answer, Service, Wanted, cancel, request_of
from paligemma_jax.serving.http.streams import EventStream, data
from paligemma_jax.tasks.prompts import class_prompts
from paligemma_jax.tasks.segmentation import crop_mask
from paligemma_jax.tasks.select import known_score, select

_SIDES = ("x_min", "y_min", "x_max", "y_max")
_LENGTHS = {"short": "cap en", "normal": "caption en", "long": "describe en"}
_MASK_SIDE = 1024  # pixels
_MOST_OBJECTS = 1000


class Settings(Body):
    temperature: float = pydantic.Field(0.0, ge=0, le=2)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_objects: int = pydantic.Field(_MOST_OBJECTS, ge=1)


class PictureRequest(Body):
    without_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {"reasoning": (False,), "spatial_refs": ([],)}

    model: str | None = None
    image_url: str
    settings: Settings = pydantic.Field(default_factory=Settings)


class CaptionRequest(PictureRequest):
    length: Literal["short", "normal", "long"] = "normal"
    stream: bool = False


class QueryRequest(PictureRequest):
    question: str
    stream: bool = False


class ObjectRequest(PictureRequest):
    object: str


class SegmentRequest(ObjectRequest):
    stream: bool = False


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/caption", openapi_extra=takes(CaptionRequest))
    async def caption(request: Request) -> Response:
        """Describe a picture: {caption}."""
        body = await read(request, CaptionRequest, service.settings)
        return await _text(service, request, body, _LENGTHS[body.length], "caption", body.stream)

    @router.post("/v1/query", openapi_extra=takes(QueryRequest))
    async def query(request: Request) -> Response:
        """Answer a question about a picture: {answer}."""
        body = await read(request, QueryRequest, service.settings)
        question = prompt_of([body.question], "question").text
        return await _text(service, request, body, f"answer en {question}", "answer", body.stream)

    @router.post("/v1/detect", openapi_extra=takes(ObjectRequest))
    async def detect(request: Request) -> Response:
        """Find things: {objects: [{x_min, y_min, x_max, y_max}]}."""
        body = await read(request, ObjectRequest, service.settings)
        found, size = await _objects(service, request, body, "detect")
        return Json({"objects": [_box(item, size) for item in found]})

    @router.post("/v1/point", openapi_extra=takes(ObjectRequest))
    async def point(request: Request) -> Response:
        """The middles of the boxes of things: {points: [{x, y}]}."""
        body = await read(request, ObjectRequest, service.settings)
        found, size = await _objects(service, request, body, "detect")
        boxes = [_box(item, size) for item in found]
        return Json({"points": [_middle(box) for box in boxes]})

    @router.post("/v1/segment", openapi_extra=takes(SegmentRequest))
    async def segment(request: Request) -> Response:
        """The outline of the thing with the best score: {path, bbox}; the path is 0 to 1 over the box."""
        body = await read(request, SegmentRequest, service.settings)
        service.model.mask_decoder()  # its absence is known before the long part
        found, size = await _objects(service, request, body, "segment")
        masked = [item for item in found if item.mask is not None]
        best = max(masked, key=known_score, default=None)
        bbox = None if best is None else _box(best, size)
        path = "" if best is None else svg_path(crop_mask(best.mask, best.box) > 0.5)
        if not body.stream:
            return Json({"path": path, "bbox": bbox})
        return EventStream(_segment_events(path, bbox), lambda: None)

    return router


async def _text(
    service: Service, request: Request, body: PictureRequest, prompt: str, key: str, stream: bool
) -> Response:
    _, wanted = await _wanted(service, body, prompt, constrain=False)
    if stream:
        answers = await service.submit(request, [wanted])
        return EventStream(_text_events(service, answers), lambda: cancel(answers))
    [end] = await service.results(request, [wanted])
    return Json({key: end.output.text})


async def _text_events(service: Service, answers: Sequence[Answer]) -> AsyncIterator[str]:
    async for _, event in service.events(answers):
        if isinstance(event, Finished):
            yield data({"completed": True})
        elif event.text:
            yield data({"chunk": event.text})


async def _segment_events(path: str, bbox: dict[str, float] | None) -> AsyncIterator[str]:
    yield data({"type": "bbox", "bbox": bbox})
    yield data({"type": "final", "path": path, "bbox": bbox, "completed": True})


async def _objects(
    service: Service, request: Request, body: ObjectRequest, task: str
) -> tuple[list[pj.Detection], tuple[int, int]]:
    """The objects of an answer, in pixels of a picture of the size that comes with them: masks need no larger one."""
    try:
        [prompt] = class_prompts(task, body.object)
    except PromptError:
        raise ApiError(400, f"object={body.object!r:.80} is no name of a thing: send one, as 'cat'", "object") from None
    picture, wanted = await _wanted(service, body, prompt.text, constrain=True)
    [end] = await service.results(request, [wanted])
    scale = min(1.0, _MASK_SIDE / max(picture.size))
    size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
    found = await service.objects(end, size, prompt.labels, masks=task == "segment")
    return select(found).kept[: body.settings.max_objects], size


async def _wanted(service: Service, body: PictureRequest, prompt: str, constrain: bool) -> tuple[Image.Image, Wanted]:
    service.check_model(body.model)
    check_tokens(service, body.settings.max_tokens, "settings.max_tokens")
    [picture] = await service.load([(body.image_url, "image_url")])
    count = body.settings.max_tokens or min(USUAL_TOKENS, service.settings.max_new_tokens)
    sampling = pj.Sampling(body.settings.temperature, top_p=body.settings.top_p, seed=service.settings.seed)
    options = pj.GenerateOptions(count, sampling, constrain)
    return picture, Wanted(request_of([picture], prompt, options))


def _box(item: pj.Detection, size: tuple[int, int]) -> dict[str, float]:
    return {name: VALUES[name][1](item, size) for name in _SIDES}


def _middle(box: dict[str, Any]) -> dict[str, float]:
    return {"x": round((box["x_min"] + box["x_max"]) / 2, 5), "y": round((box["y_min"] + box["y_max"]) / 2, 5)}
