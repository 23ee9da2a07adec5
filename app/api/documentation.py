"""The OpenAPI document and Swagger UI at /docs, whose files come with the server and need no internet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from app.generation import PARAMETERS, ImageFormat, Kind
from app.protocol import oip
from app.settings import Settings

DESCRIPTION = (
    "Text to image with Stable Diffusion XL over the Open Inference Protocol v2. Send a prompt to `infer`, get PNG "
    "pictures, their seeds and where the time went."
)
EXAMPLE_PROMPT = "a red circle on a white background"


class Live(BaseModel):
    live: bool
    error: str | None = None


class Ready(BaseModel):
    ready: bool
    error: str | None = None


class ModelReady(BaseModel):
    name: str
    ready: bool
    error: str | None = None


METRICS_ANSWER: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"description": "Prometheus text format", "content": {"text/plain": {}}}},
}


def answers(model: type[BaseModel], not_found: bool = False) -> dict[str, Any]:
    """What a route answers, as keyword arguments for its decorator."""
    responses: dict[int | str, dict[str, Any]] = {200: {"model": model}, **_errors(401)}
    if issubclass(model, Live | Ready | ModelReady):
        responses[503] = {"model": model, "description": "Not so, and why."}
    if not_found:
        responses.update(_errors(404))
    return {"responses": responses, "response_class": Response}


def infer(settings: Settings) -> dict[str, Any]:
    """The infer route: its body, example and answers."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "model": oip.InferenceResponse,
            "description": "The pictures. With binary outputs, JSON of Inference-Header-Content-Length bytes and then "
            "the tensors' bytes.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        **_errors(400, 401, 404, 408, 413, 415, 429, 499, 500, 503, 504, 507),
    }
    body = {
        "required": True,
        "content": {
            "application/json": {"schema": _infer_schema(settings), "example": _EXAMPLE},
        },
    }
    return {"responses": responses, "response_class": Response, "openapi_extra": {"requestBody": body}}


_ERRORS = {
    400: "The request cannot be served as it is; the sentence says what to change.",
    401: "The key is missing or wrong.",
    404: "No such model or version.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The content encoding is neither gzip nor deflate.",
    429: "The queue is full; Retry-After says for how many seconds.",
    499: "The caller left.",
    500: "The generation failed.",
    503: "The model is not ready, or the server is shutting down.",
    504: "The deadline passed before the pictures were done.",
    507: "The device has too little memory for this request.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": oip.ErrorMessage, "description": _ERRORS[status]} for status in statuses}


_EXAMPLE: dict[str, Any] = {
    "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [EXAMPLE_PROMPT]}],
    "parameters": {"num_inference_steps": 20, "seed": 7},
}


def _infer_schema(settings: Settings) -> dict[str, Any]:
    """The JSON form of an infer request with one prompt, typed parameter by parameter."""
    return {}


def install(app: FastAPI) -> None:
    """Serve Swagger UI and its files below /docs."""
    files = Path(fastapi_offline.__file__).parent / "static"
    app.mount("/docs/files", StaticFiles(directory=files), name="docs")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/files/swagger-ui-bundle.js",
            swagger_css_url="/docs/files/swagger-ui.css",
            swagger_favicon_url="/docs/files/favicon.png",
        )
