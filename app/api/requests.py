"""Requests by their ids: how far one is, and its end before its time."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.api import documentation, edge
from app.engine.queue import RequestStatus
from app.engine.repository import Repository


def router(repository: Repository) -> APIRouter:
    """The routes over all models.

    Args:
        repository: the models.
    """
    routes = APIRouter()

    @routes.get(
        "/v2/requests/{request_id}",
        operation_id="request_status",
        summary="How far is a request?",
        tags=["Pictures"],
        **documentation.request_status("How it is, or how it ended."),
    )
    async def status(request: Request) -> Response:
        identifier = request.path_params["request_id"]
        return _response(identifier, repository.status(identifier))

    @routes.delete(
        "/v2/requests/{request_id}",
        operation_id="cancel_request",
        summary="Cancel a request and forget it",
        tags=["Pictures"],
        **documentation.request_status("How it ended: cancelled, or as it had before. It is forgotten now."),
    )
    async def cancel(request: Request) -> Response:
        identifier = request.path_params["request_id"]
        return _response(identifier, repository.cancel(identifier))

    return routes


def _response(identifier: str, status: RequestStatus) -> Response:
    fields = documentation.RequestProgress(
        id=identifier,
        state=status.state.value,
        step=status.steps_done,
        steps=status.steps_total,
        place=status.place or None,
        remaining_seconds=None if status.seconds is None else round(status.seconds, 3),
        error=status.error,
    )
    return edge.json_response(fields.model_dump(exclude_none=True))
