"""The Open Inference Protocol v2 over HTTP: health, metadata and infer."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.api import documentation, edge
from app.api.serving import Serving
from app.engine.repository import Model, Repository
from app.generation import PARAMETERS, Generation
from app.protocol import oip
from app.protocol.generate import check_whole
from app.protocol.infer_request import parse_infer


def router(serving: Serving, version: str) -> APIRouter:
    """Every route of the protocol.

    Args:
        serving: the models and the way to their pictures.
        version: of this server, as its metadata tells.
    """
    routes = APIRouter()
    repository, settings = serving.repository, serving.settings

    @routes.get(
        "/v2",
        operation_id="server_metadata",
        summary="Server metadata",
        tags=["Server"],
        **documentation.answers(oip.ServerMetadata),
    )
    async def server_metadata() -> Response:
        return edge.json_response(oip.server_metadata(version).model_dump())

    @routes.get(
        "/v2/health/live",
        operation_id="server_live",
        summary="Is the server alive?",
        tags=["Server"],
        **documentation.answers(documentation.Live),
    )
    async def server_live() -> Response:
        if repository.live:
            return edge.json_response({"live": True})
        return edge.json_response({"live": False, "error": edge.NOT_LIVE}, 503)

    @routes.get(
        "/v2/health/ready",
        operation_id="server_ready",
        summary="Is every model ready?",
        tags=["Server"],
        **documentation.answers(documentation.Ready),
    )
    async def server_ready() -> Response:
        if repository.ready:
            return edge.json_response({"ready": True})
        states = ", ".join(f"{model.name} is {model.condition}" for model in repository)
        return edge.json_response({"ready": False, "error": f"Not every model is ready: {states}."}, 503)

    @routes.get(
        "/v2/models/{model_name}",
        operation_id="model_metadata",
        summary="Model metadata",
        tags=["Model"],
        **documentation.answers(oip.ModelMetadata, not_found=True),
    )
    @routes.get(
        "/v2/models/{model_name}/versions/{model_version}",
        operation_id="model_version_metadata",
        summary="Model metadata of one version",
        tags=["Model"],
        **documentation.answers(oip.ModelMetadata, not_found=True),
    )
    async def model_metadata(request: Request) -> Response:
        model = _find(repository, request)
        taken = model.family.parameters if model.family else frozenset(PARAMETERS)
        return edge.json_response(oip.model_metadata(model.name, taken).model_dump())

    @routes.get(
        "/v2/models/{model_name}/ready",
        operation_id="model_ready",
        summary="Is the model ready?",
        tags=["Model"],
        **documentation.answers(documentation.ModelReady, not_found=True),
    )
    @routes.get(
        "/v2/models/{model_name}/versions/{model_version}/ready",
        operation_id="model_version_ready",
        summary="Is this version of the model ready?",
        tags=["Model"],
        **documentation.answers(documentation.ModelReady, not_found=True),
    )
    async def model_ready(request: Request) -> Response:
        return edge.readiness_response(_find(repository, request))

    @routes.post(
        "/v2/models/{model_name}/infer",
        operation_id="infer",
        summary="Paint pictures",
        tags=["Pictures"],
        **documentation.infer(settings),
    )
    @routes.post(
        "/v2/models/{model_name}/versions/{model_version}/infer",
        operation_id="infer_version",
        summary="Paint pictures with one version of the model",
        tags=["Pictures"],
        **documentation.infer(settings),
    )
    async def infer(request: Request) -> Response:
        def parse(body: bytes) -> oip.InferCall:
            return parse_infer(body, request.headers.get(edge.JSON_LENGTH))

        def write(call: oip.InferCall, generation: Generation) -> tuple[bytes, int | None]:
            names = request.path_params
            return oip.write_infer(call, generation, names["model_name"], names.get("model_version"))

        return edge.infer_response(*await serving.answer("infer", request, parse, write, check_whole))

    return routes


def _find(repository: Repository, request: Request) -> Model:
    """The model that the path names, in the version that it names, if any."""
    return repository.get(request.path_params["model_name"], request.path_params.get("model_version"))
