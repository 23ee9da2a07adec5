"""KServe's protocol v1 over HTTP: models, their readiness, and predict.

Source: KServe ``docs/predict-api/v1`` and ``kserve/protocol/rest/v1_endpoints.py``.
"""

from __future__ import annotations

import logging

from fastapi import APIRouter, HTTPException, Request, Response

from app.api import documentation, edge
from app.api.serving import Serving
from app.errors import ModelNotFound
from app.generation import Generation
from app.protocol import v1

logger = logging.getLogger(__name__)

SEED = "X-Seed"
MAX_TOLD = 64
"""Sentences that are remembered as told."""


def router(serving: Serving) -> APIRouter:
    """Every route of the protocol.

    Args:
        serving: the models and the way to their pictures.
    """
    routes = APIRouter()
    repository = serving.repository
    told: set[str] = set()

    def tell(warnings: tuple[str, ...]) -> None:
        """The protocol's answer has no place for warnings, so the log gets each of them, once."""
        for sentence in warnings:
            if sentence not in told and len(told) < MAX_TOLD:
                told.add(sentence)
                logger.warning("a v1 request, and perhaps more to come: %s", sentence)

    @routes.get(
        "/",
        operation_id="v1_live",
        summary="Is the server alive? (v1)",
        tags=["Protocol v1"],
        **documentation.answers(documentation.Alive),
    )
    async def live() -> Response:
        if repository.live:
            return edge.json_response({"status": "alive"})
        return edge.json_response({"status": "dead", "error": edge.NOT_LIVE}, 503)

    @routes.get(
        "/v1/models",
        operation_id="v1_models",
        summary="Names of the models (v1)",
        tags=["Protocol v1"],
        **documentation.answers(documentation.Models),
    )
    async def models() -> Response:
        return edge.json_response({"models": [model.name for model in repository]})

    @routes.post(
        "/v1/models/{model_name}:predict",
        operation_id="v1_predict",
        summary="Paint pictures (v1)",
        tags=["Protocol v1"],
        **documentation.predict(serving.settings),
    )
    async def predict(request: Request) -> Response:
        def write(_: v1.PredictCall, generation: Generation) -> tuple[bytes, Generation]:
            return v1.write_predictions(generation, request.path_params["model_name"]), generation

        answer, generation = await serving.answer("predict", request, v1.parse_predict, write)
        tell(generation.warnings)
        # The body is the protocol's own and has no place for seeds.
        seeds = ", ".join(str(image.seed) for image in generation.images)
        return Response(answer, headers={SEED: seeds}, media_type="application/json")

    @routes.post("/v1/models/{model_name}:{verb}", include_in_schema=False)
    async def unknown_verb(request: Request) -> Response:
        model = repository.get(request.path_params["model_name"])
        verb = request.path_params["verb"]
        raise ModelNotFound(f"The model {model.name} has no verb {verb[:40]!r}; it has predict.")

    @routes.get(
        "/v1/models/{model_name}",
        operation_id="v1_model_ready",
        summary="Is the model ready? (v1)",
        tags=["Protocol v1"],
        **documentation.answers(documentation.ModelReady, not_found=True),
    )
    async def model_ready(request: Request) -> Response:
        name = request.path_params["model_name"]
        try:
            model = repository.get(name)
        except ModelNotFound:
            model_name, colon, verb = name.rpartition(":")
            if colon and verb == "predict" and repository.get(model_name):
                raise HTTPException(405, headers={"Allow": "POST"}) from None
            raise
        return edge.readiness_response(model)

    return routes
