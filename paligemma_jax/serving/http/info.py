"""What a server says about itself: /v1/models, /health, /ready, /metrics and /docs; and POST /v1/embed."""

import base64
import html
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from paligemma_jax.serving.http.bodies import Body, Json, read, takes
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.service import Service

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }}
td {{ padding: .2em 1em .2em 0; vertical-align: top }}
code {{ white-space: nowrap }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #eee }} a {{ color: #9cf }} }}
</style>
<h1>{title}</h1>
<p>The exact fields are in <a href="openapi.json">openapi.json</a>.</p>
<table>
{rows}
</table>
</html>
"""


class EmbedRequest(Body):
    model: str | None = None
    image_url: str | list[str]
    pool: Literal["mean", "none"] = "mean"
    stage: Literal["projected", "features"] = "projected"
    encoding_format: Literal["float", "base64"] = "float"


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    name = service.settings.model_name
    model = {"id": name, "object": "model", "created": 0, "owned_by": "paligemma_jax"}

    @router.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return Json({"object": "list", "data": [model]})

    @router.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> Response:
        """The model, by its name."""
        service.check_model(model_id)
        return Json(model)

    @router.post("/v1/embed", openapi_extra=takes(EmbedRequest))
    async def embed(request: Request) -> Response:
        """Embeddings of pictures: their mean, or one for each patch."""
        body = await read(request, EmbedRequest, service.settings)
        service.check_model(body.model)
        if isinstance(body.image_url, str):
            urls = [(body.image_url, "image_url")]
        else:
            urls = [(url, f"image_url[{number}]") for number, url in enumerate(body.image_url)]
        if not urls:
            raise ApiError(400, "there is no picture: send at least one", "image_url")
        values = await service.embed(await service.load(urls), body.stage == "projected")
        if body.pool == "mean":
            values = values.mean(axis=1)
        data = [
            {"object": "embedding", "index": i, "shape": list(row.shape), "embedding": _encoded(row, body)}
            for i, row in enumerate(values)
        ]
        return Json({"object": "list", "model": name, "data": data})

    @router.get("/health")
    async def health() -> Response:
        """Whether the process lives, in the words that Label Studio expects."""
        return Json({"status": "UP", "model_class": "PaliGemma"})

    @router.get("/ready")
    async def ready() -> Response:
        """Whether requests are answered now: 503 while programs are compiled, and before the server stops."""
        service.check_ready()
        return Json({"status": "ready"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters and times, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def docs_page(app: FastAPI) -> HTMLResponse:
    """The routes as a page that loads nothing from elsewhere."""
    rows = [
        f"<tr><td><code>{method.upper()} {html.escape(path)}</code><td>{html.escape(operation.get('description', ''))}"
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    return HTMLResponse(_PAGE.format(title=html.escape(app.title), rows="\n".join(rows)))


def _encoded(values: np.ndarray, body: EmbedRequest) -> Any:
    """Numbers, or the base64 of float32 in little endian order."""
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    if not np.isfinite(values).all():
        raise ApiError(500, "the embedding is not finite: the weights are damaged, or dtype=float16 is too small")
    return values.tolist()
