"""The Open Inference Protocol v2 over HTTP: health, metadata and infer."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter, Request, Response

from app.api import documentation, edge
from app.engine.repository import Model, Repository, State
from app.errors import RuntimeFault
from app.generation import Generation
from app.protocol import oip
from app.settings import Settings
from app.telemetry import Telemetry

logger = logging.getLogger(__name__)

JSON_LENGTH = "Inference-Header-Content-Length"
INLINE_BYTES = 64 * 1024
"""Bodies up to this size are read on the event loop; larger ones would keep it from answering health."""


def router(repository: Repository, telemetry: Telemetry, settings: Settings, version: str) -> APIRouter:
    """Every route of the protocol.

    Args:
        repository: the models.
        telemetry: where seconds and refusals are counted.
        settings: body limits and whether to log latencies.
        version: of this server, as its metadata tells.
    """
    routes = APIRouter()

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
        live = repository.live
        if live:
            return edge.json_response({"live": True})
        return edge.json_response({"live": False, "error": "The device thread is gone; restart the server."}, 503)

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
        states = ", ".join(f"{model.name} is {model.state}" for model in repository)
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
        return edge.json_response(oip.model_metadata(model.name).model_dump())

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
        model = _find(repository, request)
        if model.state is State.READY:
            return edge.json_response({"name": model.name, "ready": True})
        sentence = f"The model {model.name} is {model.state}."
        return edge.json_response({"name": model.name, "ready": False, "error": sentence}, 503)

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
        started = time.monotonic()
        accepted = False
        name = "-"  # in the log, only what the server itself is called
        generation: Generation | None = None
        status = 200
        try:
            model = _find(repository, request)
            name = model.name
            model.require_ready()
            body = await edge.read_body(request, settings)
            header = request.headers.get(JSON_LENGTH)
            if len(body) <= INLINE_BYTES:
                call = oip.parse_infer(body, header)
            else:
                call = await asyncio.to_thread(oip.parse_infer, body, header)
            if any(request.image is not None for request in call.requests):
                requests = await asyncio.to_thread(model.resolve, call.requests)
            else:
                requests = model.resolve(call.requests)
            oip.check_pixels(call, requests)
            ticket = model.submit(requests, call.timeout)
            accepted = True
            submitted = time.monotonic()
            telemetry.preprocess.observe(submitted - started)
            generation = await edge.wait_for(ticket, request)
            finished = time.monotonic()
            telemetry.predict.observe(finished - submitted)
            version = request.path_params.get("model_version")
            answer, json_length = await asyncio.to_thread(oip.write_infer, call, generation, name, version)
            telemetry.postprocess.observe(time.monotonic() - finished)
        except RuntimeFault as fault:
            status = edge.HTTP_STATUS[fault.code]
            if not accepted:
                telemetry.rejected(fault.code)
            raise
        except Exception:
            status = 500
            raise
        finally:
            if settings.enable_latency_logging:
                _log_latency(name, status, started, generation)
        if json_length is None:
            return Response(answer, media_type="application/json")
        headers = {JSON_LENGTH: str(json_length)}
        return Response(answer, headers=headers, media_type="application/octet-stream")

    return routes


def _find(repository: Repository, request: Request) -> Model:
    """The model that the path names, in the version that it names, if any."""
    return repository.get(request.path_params["model_name"], request.path_params.get("model_version"))


def _log_latency(model_name: str, status: int, started: float, generation: Generation | None) -> None:
    fields: dict[str, object] = {"model": model_name, "status": status}
    if generation is not None:
        timings = generation.timings
        fields["images"] = len(generation.images)
        for stage in ("queue", "denoise", "decode", "encode"):
            fields[f"{stage}_s"] = round(getattr(timings, stage), 4)
    fields["total_s"] = round(time.monotonic() - started, 4)
    logger.info("infer", extra={"fields": fields})
