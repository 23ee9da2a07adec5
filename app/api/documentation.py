"""The OpenAPI document at /openapi.json and Swagger UI at /docs, whose files come with the server: no internet needed.

What routes answer is told here, as arguments for their decorators; what they take is told in `infer_schema.py`,
`generate_schema.py` and `predict_schema.py`.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import fastapi_offline
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict

from app.api import edge, generate_schema, infer_schema, predict_schema
from app.api.offer import Offer
from app.engine.family import Family
from app.engine.repository import Model
from app.protocol import oip
from app.settings import Settings

DESCRIPTION = """\
Text to image with Stable Diffusion XL over the [Open Inference Protocol v2](https://github.com/kserve/open-inference-protocol).

Send a prompt to [`infer`](#/Pictures/infer) and get pictures, their seeds and where the time went. Every error is
`{"error": "…"}` with one sentence that says what to change. A method that a path does not have answers 405 with
`Allow`. A request may bring its own `X-Request-Id`; every answer carries one, and so do the server's log lines.
"""

TAGS = [
    {"name": "Pictures", "description": "From prompt to picture."},
    {"name": "Model", "description": "What the model takes and gives, and whether it is ready."},
    {"name": "Server", "description": "Who is answering, and how it is."},
    {"name": "Protocol v1", "description": "KServe's first protocol, for clients that speak it."},
    {"name": "Operations", "description": "For those who run it."},
]

_ERRORS = {
    400: (
        "The request cannot be served as it is.",
        "There is no parameter 'num_steps' (did you mean 'num_inference_steps'?).",
    ),
    401: ("The key is missing or wrong.", "Send the server's key as 'Authorization: Bearer KEY'."),
    404: ("No such model, or not in that version; or no such request.", "The model sdxl has no version '2'; it has 1."),
    408: ("The body did not arrive in time.", "The body did not arrive within 30 seconds."),
    413: ("The body is too large.", "The body has more than 33554432 bytes (the server's setting max_body_size)."),
    415: (
        "The body is packed in an unknown way.",
        "The content encoding 'br' is not spoken here; use gzip or deflate.",
    ),
    409: (
        "The Idempotency-Key came with another request before.",
        "This Idempotency-Key came with another request before; take a new key for a new request.",
    ),
    429: ("There is no place now.", "The queue is full (128 of 128 images); try again in 12 seconds."),
    499: (
        "The request was cancelled by its id, or the caller left, which only the log shows.",
        "The request was cancelled.",
    ),
    500: ("The server failed.", "The generation failed inside the model (RuntimeError); the server's log says more."),
    503: (
        "The model is not ready, or the server is shutting down.",
        "The model sdxl is loading; try again when it is ready.",
    ),
    504: (
        "The deadline passed before the pictures were done.",
        "The request was not done after 600.0 seconds and was given up.",
    ),
    507: (
        "The device has too little memory.",
        "The device has too little memory for a picture of 2048 x 2048; try 1024 x 1024 (height x width): pictures as "
        "large have worked.",
    ),
}
"""Status to what it means and a sentence that comes with it."""

_INFER_SCHEMA = "#/components/schemas/InferenceRequest"
_PREDICT_SCHEMA = "#/components/schemas/PredictRequest"
_GENERATE_SCHEMA = "#/components/schemas/GenerateRequest"
_GENERATE_STREAM_SCHEMA = "#/components/schemas/GenerateStreamRequest"
_INFER_STREAM_SCHEMA = "#/components/schemas/InferenceStreamRequest"
_WORDS: Mapping[str, tuple[Callable[[Offer], str], Callable[[Offer], dict[str, Any]]]] = {
    _INFER_SCHEMA: (infer_schema.description, infer_schema.examples),
    _PREDICT_SCHEMA: (predict_schema.description, predict_schema.examples),
    _GENERATE_SCHEMA: (generate_schema.description, generate_schema.examples),
    _GENERATE_STREAM_SCHEMA: (generate_schema.stream_description, generate_schema.stream_examples),
    _INFER_STREAM_SCHEMA: (generate_schema.infer_stream_description, generate_schema.infer_stream_examples),
}
"""Description and examples for each kind of body."""

_HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The request's own X-Request-Id, or a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": f"^{edge.REQUEST_ID.pattern}$"},
    },
    "Retry-After": {
        "description": "Seconds after which a place is likely to be free.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "description": "What to send.",
        "required": True,
        "schema": {"type": "string", "const": "Bearer"},
    },
    "X-Seed": {
        "description": "The seed of each picture, in the order of the predictions.",
        "required": True,
        "schema": {"type": "string", "pattern": r"^\d+(, \d+)*$"},
    },
    "Inference-Header-Content-Length": {
        "description": "In a binary answer: the number of bytes of JSON before the tensors' bytes.",
        "schema": {"type": "integer", "minimum": 1},
    },
}

_IDEMPOTENCY_KEY = {
    "name": edge.IDEMPOTENCY_KEY,
    "in": "header",
    "description": "Makes a request that is sent twice one request: the second joins the first, or gets its answer.",
    "schema": {"type": "string", "pattern": f"^{edge.KEY.pattern}$", "minLength": 1, "maxLength": 255},
}
_OWN_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "By it the request can be asked about, cancelled, and found in the log: up to 128 letters, digits, "
    "`.`, `_` and `-`. A new one takes its place where it is left out or something else.",
    "schema": {"type": "string"},
}
_LINKS = {
    name: {"operationId": operation, "parameters": {"request_id": "$response.header.X-Request-Id"}}
    for name, operation in (("status", "request_status"), ("cancel", "cancel_request"))
}
_REQUEST_ID = {
    "name": "request_id",
    "in": "path",
    "required": True,
    "description": "The X-Request-Id of the request's answer, which its caller may have chosen.",
    "schema": {"type": "string", "pattern": f"^{edge.REQUEST_ID.pattern}$"},
}

_HEADERS_OF = {"401": ("WWW-Authenticate",), "429": ("Retry-After",)}


# --- What routes answer ----------------------------------------------------------------------------------------


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


class Alive(BaseModel):
    status: Literal["alive", "dead"]
    error: str | None = None


class Models(BaseModel):
    models: list[str]


class EncodedImage(BaseModel):
    format: Literal["PNG", "JPEG", "WEBP"]
    b64: str


class Prediction(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    prompt: str
    image: EncodedImage


class PredictResponse(BaseModel):
    predictions: list[Prediction]


class RequestProgress(BaseModel):
    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    step: int
    steps: int
    place: int | None = None
    remaining_seconds: float | None = None
    error: str | None = None


def answers(model: type[BaseModel], not_found: bool = False) -> dict[str, Any]:
    """What a route answers, as keyword arguments for its decorator."""
    responses: dict[int | str, dict[str, Any]] = {200: {"model": model, "description": "As asked."}}
    if not_found:
        responses |= _errors(404)
    responses |= _errors(500)
    if issubclass(model, Live | Ready | ModelReady | Alive):
        responses[503] = {"model": model, "description": "Not so, and why."}
    return {"responses": responses, "response_class": Response}


def infer(settings: Settings) -> dict[str, Any]:
    """What the infer route takes and answers, as keyword arguments for its decorator."""
    media_types = {
        "application/json": {"example": infer_schema.answer(settings.model_name)},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    description = "The pictures. In a binary answer the tensors' bytes follow the JSON, in the order of the outputs."
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": oip.InferenceResponse, "description": description, "content": media_types},
        **_errors(400, 404, 408, 409, 413, 415, 429, 499, 500, 503, 504, 507),
    }
    return _generation(responses, _INFER_SCHEMA)


def generate(settings: Settings) -> dict[str, Any]:
    """What the generate route takes and answers, as keyword arguments for its decorator."""
    return _generation(infer(settings)["responses"], _GENERATE_SCHEMA)


def generate_stream(settings: Settings) -> dict[str, Any]:
    """What the generate_stream route takes and answers, as keyword arguments for its decorator."""
    return _generation(_stream(settings), _GENERATE_STREAM_SCHEMA)


def infer_stream(settings: Settings) -> dict[str, Any]:
    """What the infer_stream route takes and answers, as keyword arguments for its decorator."""
    return _generation(_stream(settings), _INFER_STREAM_SCHEMA)


def _stream(settings: Settings) -> dict[int | str, dict[str, Any]]:
    example = {"schema": {"$ref": "#/components/schemas/Event"}, "example": generate_schema.EVENTS_EXAMPLE}
    events = {"description": "Events, up to the answer or an error.", "content": {"text/event-stream": example}}
    return {**infer(settings)["responses"], 200: events}


def request_status(description: str) -> dict[str, Any]:
    """What the routes of a request by its id answer, as keyword arguments for their decorators."""
    responses = {200: {"model": RequestProgress, "description": description}, **_errors(404, 500)}
    return {"responses": responses, "response_class": Response}


def predict(settings: Settings) -> dict[str, Any]:
    """What the v1 predict route takes and answers, as keyword arguments for its decorator."""
    example = {"application/json": {"example": predict_schema.answer(settings.model_name)}}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": PredictResponse, "description": "The pictures.", "content": example},
        **_errors(400, 404, 408, 409, 413, 415, 429, 499, 500, 503, 504, 507),
    }
    return _generation(responses, _PREDICT_SCHEMA)


def _generation(responses: dict[int | str, dict[str, Any]], schema: str) -> dict[str, Any]:
    # What schema, examples and text say depends on the model, which is not there yet; `_document` brings them.
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": schema}}}}
    return {
        "responses": responses,
        "response_class": Response,
        "openapi_extra": {"requestBody": body},
    }


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description, sentence = _ERRORS[status]
        content = {"application/json": {"example": {"error": sentence}}}
        responses[status] = {"model": oip.ErrorMessage, "description": description, "content": content}
    return responses


METRICS_ANSWER: dict[str, Any] = {
    "operation_id": "metrics",
    "response_class": Response,
    "responses": {
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **_errors(500),
    },
}


# --- The document and the page ---------------------------------------------------------------------------------


def install(app: FastAPI, settings: Settings, model: Model) -> None:
    """Serve the OpenAPI document, Swagger UI and its files.

    Args:
        app: with all its other routes.
        settings: for the limits and whether there is a key.
        model: its defaults are documented once it is loaded.
    """
    page = (Path(__file__).parent / "static" / "docs.html").read_bytes()
    files = Path(fastapi_offline.__file__).parent / "static"
    app.mount("/docs/files", StaticFiles(directory=files), name="docs")

    @functools.cache
    def document(family: Family[Any] | None) -> bytes:
        return json.dumps(_document(app, settings, family)).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        # Made at the first call, which takes a moment: a hundred requests are tried for what the model takes.
        return Response(await asyncio.to_thread(document, model.family), media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page, media_type="text/html; charset=utf-8")


def _document(app: FastAPI, settings: Settings, family: Family[Any] | None) -> dict[str, Any]:
    """FastAPI's document, completed.

    Args:
        app: with all its routes.
        settings: for the limits and whether there is a key.
        family: the loaded model, if it is.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=TAGS
    )
    offer = Offer(settings.limits, family)
    components = _without_null(document["components"])
    components["schemas"] |= infer_schema.schemas(offer)
    components["schemas"] |= generate_schema.schemas(offer)
    components["schemas"]["PredictRequest"] = predict_schema.schema(offer)
    # FastAPI's own validation never speaks: what a path holds is text, and bodies are read by hand.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["headers"] = _HEADERS
    if settings.api_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    document["components"] = components

    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, path, settings)
            _tell_offer(operation, offer)
    document["paths"] = dict(sorted(document["paths"].items(), key=_reading_order))
    return document


def _tell_offer(operation: dict[str, Any], offer: Offer) -> None:
    """Add to an operation that paints what the model takes, in words and examples."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    words = _WORDS.get(content.get("schema", {}).get("$ref", ""))
    if words is not None:
        description, examples = words
        operation["description"] = description(offer)
        content["examples"] = examples(offer)
        operation.setdefault("parameters", []).extend([_OWN_ID, _IDEMPOTENCY_KEY])
        operation["responses"]["200"]["links"] = _LINKS


def _complete(operation: dict[str, Any], path: str, settings: Settings) -> None:
    """Add to one operation what FastAPI cannot know, and drop what it gets wrong."""
    served = {"model_name": settings.model_name, "model_version": oip.MODEL_VERSION}
    # Handlers read these from the path themselves: one handler serves the paths with and without a version.
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [only], "default": only}}
        for name, only in served.items()
        if f"{{{name}}}" in path
    ]
    if "{request_id}" in path:
        parameters.append(_REQUEST_ID)
    if parameters:
        operation["parameters"] = parameters

    responses = operation["responses"]
    responses.pop("422", None)
    if settings.api_key and path in edge.OPEN_PATHS:
        operation["security"] = []
    elif settings.api_key:
        description, sentence = _ERRORS[401]
        content = {"schema": {"$ref": "#/components/schemas/ErrorMessage"}, "example": {"error": sentence}}
        responses["401"] = {"description": description, "content": {"application/json": content}}
    for status, response in responses.items():
        headers = ["X-Request-Id", *_HEADERS_OF.get(status, ())]
        if "application/octet-stream" in response["content"]:
            headers.append("Inference-Header-Content-Length")
        if status == "200" and path.endswith(":predict"):
            headers.append("X-Seed")
        response["headers"] = {header: {"$ref": f"#/components/headers/{header}"} for header in headers}
    operation["responses"] = dict(sorted(responses.items()))


def _reading_order(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    path, operations = item
    tags = [tag["name"] for tag in TAGS]
    return min(tags.index(operation["tags"][0]) for operation in operations.values()), len(path)


def _without_null(node: Any) -> Any:
    """A schema in which what may be absent is never null: the server leaves such fields out."""
    if isinstance(node, list):
        return [_without_null(part) for part in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_null(value) for key, value in node.items()}
    options = [option for option in node.pop("anyOf", ()) if option != {"type": "null"}]
    return node | options[0] if len(options) == 1 else node | ({"anyOf": options} if options else {})
