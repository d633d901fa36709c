"""The ASGI application: all routes behind one gate."""

from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import paligemma_jax as pj
from paligemma_jax.serving.http import chat, info, label_studio, moondream, responses
from paligemma_jax.serving.http.bodies import SCHEMAS, Json
from paligemma_jax.serving.http.errors import ApiError
from paligemma_jax.serving.http.gate import Gate
from paligemma_jax.serving.http.service import Service

_BODIES = (
    *(chat.ChatRequest, responses.ResponsesRequest, info.EmbedRequest, label_studio.PredictRequest),
    *(moondream.CaptionRequest, moondream.QueryRequest, moondream.ObjectRequest, moondream.SegmentRequest),
)


def make_app(service: Service) -> FastAPI:
    """The application of a service; its pages load nothing from elsewhere."""
    app = FastAPI(title="paligemma_jax", version=pj.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in (chat, responses, moondream, label_studio, info):
        app.include_router(module.routes(service))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return info.docs_page(app)

    @app.exception_handler(HTTPException)
    async def of_router(request: Request, error: HTTPException) -> Response:
        known = ApiError(error.status_code, f"{request.method} of this path: {error.detail}. GET /docs lists all paths")
        return Json(known.body(), error.status_code, dict(error.headers or {}))

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            _, definitions = models_json_schema([(body, "validation") for body in _BODIES], ref_template=SCHEMAS)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return app.openapi_schema or schema

    app.openapi = openapi
    app.add_middleware(Gate, service=service)
    if origins := service.settings.cors_origins:  # outside the gate: browsers ask without a key first
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", "x-moondream-auth"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
