"""POST /predict and /setup, as Label Studio asks its ML backends; rectangles and brush masks."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from typing import Any

import pydantic
from fastapi import APIRouter, Request, Response

import paligemma_jax as pj
from paligemma_jax.errors import PromptError
from paligemma_jax.serving.http.asking import USUAL_TOKENS
from paligemma_jax.serving.http.bodies import Body, Json, read, takes
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.outlines import brush_rle
from paligemma_jax.serving.http.service import Service, Wanted, request_of
from paligemma_jax.tasks.prompts import Prompt, class_prompts
from paligemma_jax.tasks.select import known_score, select

_KINDS = {"RectangleLabels": ("rectanglelabels", "detect"), "BrushLabels": ("brushlabels", "segment")}
_MOST_TASKS = 64
_MOST_LABELS = 100


class Task(Body):
    model_config = pydantic.ConfigDict(extra="ignore")  # Label Studio sends all that it knows of a task

    data: dict[str, Any]
    id: int | str | None = None


class PredictRequest(Body):
    model_config = pydantic.ConfigDict(extra="ignore")

    tasks: list[Task] = pydantic.Field(max_length=_MOST_TASKS)
    label_config: str = pydantic.Field(max_length=2**18)


@dataclasses.dataclass(frozen=True)
class Control:
    """What a labelling config asks for: a set of labels, and the picture that they are of."""

    kind: str  # rectanglelabels or brushlabels
    task: str  # detect or segment
    from_name: str
    to_name: str
    field: str  # of a task's data
    labels: tuple[str, ...]

    def prompt(self) -> Prompt:
        try:
            return class_prompts(self.task, list(self.labels))[0]
        except PromptError:
            raise ApiError(400, "label_config has labels that no answer can have", "label_config") from None


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/setup")
    async def setup() -> Response:
        """Which model answers; at once, as Label Studio does not wait."""
        return Json({"model_version": service.settings.model_name})

    @router.post("/predict", openapi_extra=takes(PredictRequest))
    async def predict(request: Request) -> Response:
        """A prediction for each task, in their order; one whose picture cannot be read is empty and says why."""
        body = await read(request, PredictRequest, service.settings)
        control = read_label_config(body.label_config)
        prompt = control.prompt()
        if control.task == "segment":
            service.model.mask_decoder()
        count = min(2 * USUAL_TOKENS, service.settings.max_new_tokens)
        options = pj.GenerateOptions(count, pj.Sampling(seed=service.settings.seed), constrain=True)
        loaded, errors = {}, {}
        for number, task in enumerate(body.tasks):
            param = f"tasks[{number}].data.{control.field}"
            try:
                url = task.data.get(control.field)
                if not isinstance(url, str):
                    raise ApiError(400, f"{param} is missing", param)
                [loaded[number]] = await service.load([(url, param)])
            except ApiError as error:
                errors[number] = error.message
        wanted = [Wanted(request_of([picture], prompt.text, options)) for picture in loaded.values()]
        ends = await service.results(request, wanted)
        results = []
        found = {}
        for (number, picture), end in zip(loaded.items(), ends, strict=True):
            objects = await service.objects(end, picture.size, prompt.labels, control.task == "segment")
            found[number] = _prediction(control, select(objects).kept, picture.size)
        empty = {"result": [], "score": 0.0}
        for number in range(len(body.tasks)):
            prediction = found.get(number) or empty | {"error": errors.get(number)}
            results.append({"model_version": service.settings.model_name} | prediction)
        return Json({"results": results})

    return router


def read_label_config(text: str) -> Control:
    """What Label Studio's XML asks for; ApiError 400 for what is not supported."""
    if "<!" in text.replace("<!--", ""):
        raise ApiError(400, "label_config has a document type, which it needs not: leave it out", "label_config")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        raise ApiError(400, "label_config is no XML", "label_config") from None
    fields = {
        element.get("name", ""): element.get("value", "").removeprefix("$")
        for element in root.iter("Image")
        if element.get("value", "").startswith("$")
    }
    for tag, (kind, task) in _KINDS.items():
        for element in root.iter(tag):
            labels = tuple(label for item in element.iter("Label") if (label := item.get("value", "")))
            names = element.get("name", ""), element.get("toName", "")
            if labels and names[1] in fields:
                if len(labels) > _MOST_LABELS:
                    raise ApiError(400, f"label_config has more than {_MOST_LABELS} labels", "label_config")
                return Control(kind, task, *names, fields[names[1]], labels)
    message = "label_config needs RectangleLabels or BrushLabels with a Label, and the Image that they are of"
    raise ApiError(400, message, "label_config")


def _prediction(control: Control, found: list[pj.Detection], size: tuple[int, int]) -> dict[str, Any]:
    regions = [_region(control, item, size) for item in found if control.task == "detect" or item.mask is not None]
    scores = [region["score"] for region in regions]
    return {"result": regions, "score": round(sum(scores) / len(scores), 4) if scores else 0.0}


def _region(control: Control, item: pj.Detection, size: tuple[int, int]) -> dict[str, Any]:
    """An object; sides of a rectangle are in percent of the picture's."""
    if control.task == "segment":
        value = {"format": "rle", "rle": brush_rle(item.mask)}
    else:
        x0, y0, x1, y1 = (100 * v / size[i % 2] for i, v in enumerate(item.box))
        sides = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        value = {name: round(v, 4) for name, v in sides.items()} | {"rotation": 0}
    return {
        "from_name": control.from_name,
        "to_name": control.to_name,
        "type": control.kind,
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "value": value | {control.kind: [item.label]},
        "score": round(known_score(item), 4),
    }
