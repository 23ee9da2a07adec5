"""Where requests enter and leave: the one table from error to status, keys, ids, and hanging up.

Every transport uses this; it knows no protocol's messages and no model.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.engine.idempotency import Once
from app.engine.repository import Model, State
from app.engine.ticket import Ticket
from app.errors import BodyTooSlow, Cancelled, InvalidRequest, RuntimeFault
from app.generation import Generation
from app.sentences import shorten
from app.telemetry import Access, AccessLog, request_id

logger = logging.getLogger(__name__)

HTTP_STATUS: Mapping[str, int] = {
    errors.InvalidRequest.code: 400,
    errors.Unauthorized.code: 401,
    errors.ModelNotFound.code: 404,
    errors.RequestNotFound.code: 404,
    errors.BodyTooSlow.code: 408,
    errors.KeyReused.code: 409,
    errors.BodyTooLarge.code: 413,
    errors.UnsupportedEncoding.code: 415,
    errors.Overloaded.code: 429,
    errors.Cancelled.code: 499,
    errors.RuntimeFault.code: 500,
    errors.GenerationFailed.code: 500,
    errors.DeviceLost.code: 500,
    errors.StartupError.code: 500,
    errors.InvalidSettings.code: 500,
    errors.ModelLoadFailed.code: 500,
    errors.Unavailable.code: 503,
    errors.ModelNotReady.code: 503,
    errors.ShuttingDown.code: 503,
    errors.DeadlineExceeded.code: 504,
    errors.OutOfMemory.code: 507,
}
"""The only place that knows what an error is called in HTTP."""

OPEN_PATHS = frozenset({"/", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no key: an orchestrator's probes carry none."""
PAGE = re.compile("/docs(/files/.*)?|/openapi.json")
"""What a browser opens: it has no other key than a password, for which it asks where it is told to. That is good for
nothing else, as a browser sends it with whatever another site makes it send."""

CHALLENGE = 'Basic realm="the key is the password", charset="UTF-8"'
"""Source: RFC 7617, 2 and 2.1."""

NOT_LIVE = "The device has failed or hangs; restart the server."

JSON_LENGTH = "Inference-Header-Content-Length"
IDEMPOTENCY_KEY = "Idempotency-Key"
KEY = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


# --- Errors ----------------------------------------------------------------------------------------------------


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII only: an error may quote text that is no valid Unicode.
    return Response(json.dumps(content), status, headers=headers, media_type="application/json")


def readiness_response(model: Model) -> Response:
    if model.state is State.READY:
        return json_response({"name": model.name, "ready": True})
    sentence = f"The model {model.name} is {model.condition}."
    return json_response({"name": model.name, "ready": False, "error": sentence}, 503)


def error_response(fault: RuntimeFault) -> Response:
    headers: dict[str, str] = {}
    if isinstance(fault, errors.Overloaded):
        headers["Retry-After"] = str(math.ceil(fault.retry_after))
    if isinstance(fault, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(fault, BodyTooSlow | errors.ShuttingDown):
        # A server that ends takes nothing more, and what is left of a slow body will not be read.
        headers["Connection"] = "close"
    return json_response({"error": str(fault)}, HTTP_STATUS[fault.code], headers)


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute], *, documented: bool) -> None:
    """Give every error the protocol's body ``{"error": "…"}``, the framework's own too.

    Args:
        app: whose errors.
        routes: of which a path may have several, for its several methods.
        documented: whether there is a page that says what there is.
    """

    hint = "; see /docs for what there is" if documented else ""

    async def fault_handler(_: Request, error: Exception) -> Response:
        assert isinstance(error, RuntimeFault)
        return error_response(error)

    async def http_handler(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sentences = {
            404: f"There is nothing at {shorten(request.url.path)}{hint}.",
            405: f"{request.method} is not allowed at {shorten(request.url.path)}.",
        }
        sentence = sentences.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if "Allow" in headers:
            # The framework names those of the path's first route only.
            found = [route for route in routes if isinstance(route, Route) and route.path_regex.match(request.url.path)]
            same = [route for route in found if route.path == found[0].path]
            methods = {headers["Allow"], *(name for route in same for name in route.methods or ())}
            if "GET" in methods:
                methods.add("HEAD")
            headers["Allow"] = ", ".join(sorted(methods))
        return json_response({"error": sentence}, error.status_code, headers)

    async def validation_handler(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        return error_response(InvalidRequest(f"{place}: {detail['msg']}."))

    app.add_exception_handler(RuntimeFault, fault_handler)
    app.add_exception_handler(HTTPException, http_handler)
    app.add_exception_handler(RequestValidationError, validation_handler)


# --- Every request ---------------------------------------------------------------------------------------------


def _plain(path: str) -> str:
    """`path` without a server before it or a slash behind it."""
    if path[:8].lower().startswith(("http://", "https://")):
        # As to a proxy, which every server has to take: RFC 9112, 3.2.2.
        path = "/" + path.split("/", 3)[3] if path.count("/") > 2 else "/"
    return path.rstrip("/") or "/" if path.endswith("/") else path


class _Body:
    """What comes behind a request's headers, of which a part may be missing when the answer is there.

    Args:
        receive: waits for its next part.
        seconds: that may be waited for its parts, all together; those in which nobody asked are no fault of the client.
    """

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive = receive
        self._seconds = seconds
        self.is_whole = False

    async def receive(self) -> Message:
        asked = time.monotonic()
        try:
            message = await self._receive()
        finally:
            self._seconds -= time.monotonic() - asked
        self.is_whole = not message.get("more_body")
        return message

    async def discard(self) -> None:
        """Read the rest, and keep nothing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                while not self.is_whole:
                    await self.receive()


class Edge:
    """ASGI middleware: gives each request an id, checks its key, and reads ``/path/`` as ``/path``.

    A connection that is to be closed stays open until its client has sent all, as long as a body may take: many look
    for an answer only then, and lose it when the connection is closed before.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, access_log: AccessLog | None, documented: bool, body_timeout: float
    ) -> None:
        self._app = app
        self._body_timeout = body_timeout
        self._documented = documented
        self._access_log = access_log
        self._api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identifier = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(identifier)

        path = _plain(scope["path"])
        if path != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode("utf-8", "surrogateescape")}

        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn, which goes by the request, leaves the body out

        started = time.monotonic()
        status = size = 0
        fault: RuntimeFault
        body = _Body(receive, self._body_timeout)
        options = [option.strip() for option in headers.get(b"connection", b"").lower().split(b",")]
        # Two lengths of one body: a proxy may go by the other one, and see requests in what is left of it.
        is_ambiguous = b"content-length" in headers and b"transfer-encoding" in headers
        closes = is_ambiguous or b"close" in options or scope["http_version"] == "1.0"

        async def send_with_id(message: Message) -> None:
            nonlocal status, size, closes
            size += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                closes = closes or (b"connection", b"close") in message.get("headers", ())
                own = [(b"x-request-id", identifier.encode()), *([(b"connection", b"close")] if is_ambiguous else ())]
                message["headers"] = [*message.get("headers", ()), *own]
            elif closes and not body.is_whole and not message.get("more_body"):
                await send({**message, "more_body": True})
                try:
                    await body.discard()
                finally:
                    await send({"type": "http.response.body"})
                return
            await send(message)

        try:
            is_page = self._documented and PAGE.fullmatch(path) is not None and method in ("GET", "HEAD")
            if self._api_key is None or path in OPEN_PATHS or self._authorized(headers, is_page):
                await self._app(scope, body.receive, send_with_id)
            else:
                fault = errors.Unauthorized("Send the server's key as 'Authorization: Bearer KEY'.")
                response = error_response(fault)
                if is_page:
                    response.headers.append("WWW-Authenticate", CHALLENGE)
                await response(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # A server that ends has waited long enough. What is half out stays so; uvicorn breaks the connection.
            if not status:
                body.is_whole = True  # as far as anybody waits for it
                fault = errors.ShuttingDown("The server shut down before the request was done.")
                await error_response(fault)(scope, receive, send_with_id)
        except Exception:
            logger.exception("a request failed for a reason that nobody foresaw")
            if status:
                raise  # half an answer is out; uvicorn breaks the connection
            fault = RuntimeFault("Something unforeseen went wrong; the server's log says more.")
            await error_response(fault)(scope, receive, send_with_id)
        finally:
            if self._access_log is not None:
                self._access_log.log(
                    Access(
                        client=quote((scope.get("client") or ("-",))[0], safe=":.%"),  # a proxy's word
                        method=method,
                        path=quote(path, safe="/:"),
                        query=scope["query_string"].decode("latin-1"),
                        protocol=f"HTTP/{scope['http_version']}",
                        status=status or 500,
                        size=size,
                        seconds=time.monotonic() - started,
                        referer=_printable(headers.get(b"referer", b"-")),
                        agent=_printable(headers.get(b"user-agent", b"-")),
                    )
                )

    def _authorized(self, headers: Mapping[bytes, bytes], by_password: bool) -> bool:
        assert self._api_key is not None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if by_password and scheme.lower() == b"basic":
            with contextlib.suppress(binascii.Error):
                _, _, password = base64.b64decode(key).partition(b":")
                return hmac.compare_digest(password, self._api_key)
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._api_key)


def _printable(value: bytes) -> str:
    return quote(value.decode("latin-1"), safe=" ()/;:,.+-_=")


# --- Requests and answers --------------------------------------------------------------------------------------


def once(request: Request, body: bytes) -> Once | None:
    """What makes this request the same as another one, where its caller wants that.

    Raises:
        InvalidRequest: the key is not one.
    """
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is None:
        return None
    if not KEY.fullmatch(key):
        raise InvalidRequest(f"{IDEMPOTENCY_KEY} must be 1 to 255 printable ASCII characters.")
    # The same body means something else at another path, or with another length of its JSON.
    path = request.scope["path"]
    header = request.headers.get(JSON_LENGTH, "")
    return Once(key, hashlib.sha256(f"{path}\0{header}\0".encode() + body).digest())


def infer_response(answer: bytes, json_length: int | None) -> Response:
    """The answer to an infer call, which has tensors' bytes behind its JSON where that has a length."""
    if json_length is None:
        return Response(answer, media_type="application/json")
    return Response(answer, headers={JSON_LENGTH: str(json_length)}, media_type="application/octet-stream")


# --- Waiting ---------------------------------------------------------------------------------------------------


def pictures_of(ticket: Ticket) -> asyncio.Future[Generation]:
    """The ticket's pictures, or why there are none, for this event loop."""
    pictures: asyncio.Future[Generation] = asyncio.wrap_future(ticket.future)
    # Nobody may be left to look at the outcome; that is no reason for a warning about it.
    pictures.add_done_callback(lambda future: future.cancelled() or future.exception())
    return pictures


async def wait_for(ticket: Ticket, request: Request) -> Generation:
    """The ticket's pictures; when the client hangs up first, and nobody else waits for it, the ticket is cancelled.

    Raises:
        GenerationFailed: as the ticket ends.
    """
    done = pictures_of(ticket)
    gone = asyncio.ensure_future(hung_up(request))
    try:
        waited: list[asyncio.Future[Any]] = [done, gone]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Cancelled("The client closed the connection.")
        return done.result()
    finally:
        gone.cancel()
        ticket.leave(request_id=request_id.get())


async def hung_up(request: Request) -> None:
    """Returns once the client has closed the connection; to be called when its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
