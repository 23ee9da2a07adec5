"""Pictures as they come: server-sent events from a request's place in the queue to its answer, and the short form.

Knows no protocol's messages beyond the names of events.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from app.api import documentation, edge
from app.api.serving import Exchange, Serving
from app.engine.ticket import Ticket
from app.errors import Cancelled, RuntimeFault
from app.generation import Generation, Preview, Progress
from app.protocol import oip
from app.protocol.generate import (
    HEARTBEAT,
    check_stream,
    check_whole,
    error_event,
    event,
    news_event,
    parse_generate,
)
from app.telemetry import Telemetry, request_id

MAX_PENDING = 64
"""News that wait for a slow client; behind them the oldest are left out."""
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    # nginx, and proxies that learned from it, would keep events until there are many.
    "X-Accel-Buffering": "no",
}


def router(serving: Serving) -> APIRouter:
    """The routes of the short form and of streams.

    Args:
        serving: the models and the way to their pictures.
    """
    routes = APIRouter()

    def parse(request: Request) -> Callable[[bytes], oip.InferCall]:
        return lambda body: parse_generate(body, request.headers.get(edge.JSON_LENGTH))

    def write(request: Request) -> Callable[[oip.InferCall, Generation], tuple[bytes, int | None]]:
        names = request.path_params
        return lambda call, generation: oip.write_infer(
            call, generation, names["model_name"], names.get("model_version")
        )

    @routes.post(
        "/v2/models/{model_name}/generate",
        operation_id="generate",
        summary="Paint pictures, asked for in short",
        tags=["Pictures"],
        **documentation.generate(serving.settings),
    )
    @routes.post(
        "/v2/models/{model_name}/versions/{model_version}/generate",
        operation_id="generate_version",
        summary="Paint pictures with one version of the model, asked for in short",
        tags=["Pictures"],
        **documentation.generate(serving.settings),
    )
    async def generate(request: Request) -> Response:
        answer = await serving.answer("generate", request, parse(request), write(request), check_whole)
        return edge.infer_response(*answer)

    @routes.post(
        "/v2/models/{model_name}/generate_stream",
        operation_id="generate_stream",
        summary="Paint pictures and tell how far they are",
        tags=["Pictures"],
        **documentation.generate_stream(serving.settings),
    )
    @routes.post(
        "/v2/models/{model_name}/versions/{model_version}/generate_stream",
        operation_id="generate_stream_version",
        summary="Paint pictures with one version of the model and tell how far they are",
        tags=["Pictures"],
        **documentation.generate_stream(serving.settings),
    )
    @routes.post(
        "/v2/models/{model_name}/infer_stream",
        operation_id="infer_stream",
        summary="The same, asked for as in infer",
        tags=["Pictures"],
        **documentation.infer_stream(serving.settings),
    )
    @routes.post(
        "/v2/models/{model_name}/versions/{model_version}/infer_stream",
        operation_id="infer_stream_version",
        summary="The same with one version of the model, asked for as in infer",
        tags=["Pictures"],
        **documentation.infer_stream(serving.settings),
    )
    async def stream(request: Request) -> Response:
        news = News(asyncio.get_running_loop())
        with contextlib.ExitStack() as stack:
            # What goes wrong before the first event is an error like any other.
            exchange = stack.enter_context(Exchange(serving, "stream"))
            call, ticket = await exchange.accept(request, parse(request), check_stream, news.hear)
            stack.callback(ticket.leave, news.hear, request_id.get())

            async def finish(generation: Awaitable[Generation]) -> bytes:
                answer, _ = await exchange.write(write(request), call, await exchange.wait(generation))
                return answer

            return EventStream(request, ticket, news, finish, stack.pop_all(), serving)
        raise AssertionError("a stack does not swallow errors")

    return routes


class News:
    """What a ticket's listeners hear, from whatever thread, for one task of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: collections.deque[Progress | Preview] = collections.deque(maxlen=MAX_PENDING)
        self.came = asyncio.Event()

    def hear(self, news: Progress | Preview) -> None:
        # The loop may have been closed by a shutdown that did not wait.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._add, news)

    def _add(self, news: Progress | Preview) -> None:
        self._pending.append(news)
        self.came.set()

    def take(self) -> Iterator[Progress | Preview]:
        """All that has come, oldest first."""
        self.came.clear()
        while self._pending:
            yield self._pending.popleft()


class EventStream(Response):
    """The events of one ticket, up to its end.

    Args:
        request: whose client may hang up.
        ticket: accepted.
        news: what is heard of it.
        finish: makes the data of the last event from the ticket's pictures.
        stack: to be closed with the stream.
        serving: for counts, and the seconds between heartbeats.
    """

    def __init__(
        self,
        request: Request,
        ticket: Ticket,
        news: News,
        finish: Callable[[Awaitable[Generation]], Awaitable[bytes]],
        stack: contextlib.ExitStack,
        serving: Serving,
    ) -> None:
        super().__init__()
        self._request = request
        self._ticket = ticket
        self._news = news
        self._finish = finish
        self._stack = stack
        self._telemetry: Telemetry = serving.telemetry
        self._heartbeat = serving.settings.heartbeat_seconds
        self._request_id = request_id.get()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        self._telemetry.streams.inc()
        # The fault ends the stream with an event, and the exchange with a line in the log.
        with contextlib.suppress(RuntimeFault), self._stack:
            try:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await self._run(send)
            finally:
                self._telemetry.streams.dec()
        await send({"type": "http.response.body", "body": b""})

    async def _run(self, send: Send) -> None:
        done = edge.pictures_of(self._ticket)
        gone = asyncio.ensure_future(edge.hung_up(self._request))
        try:
            while not done.done():
                came = asyncio.ensure_future(self._news.came.wait())
                waited: list[asyncio.Future[Any]] = [done, gone, came]
                try:
                    await asyncio.wait(waited, timeout=self._heartbeat, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    came.cancel()
                if gone.done():
                    raise Cancelled("The client closed the connection.")
                if not done.done() and not self._news.came.is_set():
                    await _send(send, HEARTBEAT)
                for news in self._news.take():
                    await self._send_event(send, *news_event(news, self._request_id))
            await self._send_event(send, "done", await self._finish(done))
        except RuntimeFault as fault:
            if not gone.done():
                await self._send_event(send, "error", error_event(str(fault), fault.code, edge.HTTP_STATUS[fault.code]))
            raise
        finally:
            gone.cancel()

    async def _send_event(self, send: Send, name: str, data: bytes) -> None:
        self._telemetry.stream_event(name)
        await _send(send, event(name, data))


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
