"""The one path from what a caller sent to its pictures, for every protocol: find, read, resolve, submit, wait, write.

Knows no protocol's messages: they bring a function that reads and one that writes. What goes wrong on the way is
counted and logged here, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

from fastapi import Request

from app.api import edge
from app.api.bodies import Bodies
from app.engine.idempotency import Once
from app.engine.repository import Model, Repository
from app.engine.ticket import Listener, Ticket
from app.errors import RuntimeFault, ShuttingDown
from app.generation import GenerateRequest, Generation, PreviewWish
from app.settings import Settings
from app.telemetry import Telemetry, request_id

logger = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Bodies up to this size are read on the event loop; larger ones would keep it from answering health."""


class Call(Protocol):
    """What a protocol makes of a body."""

    @property
    def requests(self) -> Sequence[GenerateRequest]: ...

    @property
    def timeout(self) -> float | None:
        """Seconds that the caller is willing to wait, if it says so."""

    @property
    def priority(self) -> int | None:
        """1 comes first, 9 last."""

    @property
    def preview(self) -> PreviewWish | None:
        """Wanted from a stream."""

    def without_requests(self) -> Self:
        """What its answer needs of it, which are no images."""


C = TypeVar("C", bound=Call)
A = TypeVar("A")


class Serving:
    """Serves generations of a repository's models.

    Args:
        repository: the models.
        telemetry: where seconds and refusals are counted.
        settings: limits of bodies and whether to log latencies.
    """

    def __init__(self, repository: Repository, telemetry: Telemetry, settings: Settings) -> None:
        self.repository = repository
        self.telemetry = telemetry
        self.settings = settings
        self.bodies = Bodies(settings)
        # An input image may take a hundred times the memory of its file while it is read.
        self.image_readers = asyncio.Semaphore(settings.encode_threads)

    async def answer(
        self,
        verb: str,
        request: Request,
        parse: Callable[[bytes], C],
        write: Callable[[C, Generation], A],
        check: Callable[[C, Sequence[GenerateRequest]], None] | None = None,
    ) -> A:
        """The whole path for an HTTP request that is answered in one piece.

        Args:
            verb: what the log calls it.
            request: its path names ``model_name`` and perhaps ``model_version``.
            parse: reads the body.
            write: makes the answer; called on a thread of its own.
            check: refuses a call whose answer could not be written, given its requests with all defaults filled in.

        Raises:
            RuntimeFault: it was refused, or ended without pictures.
        """
        with Exchange(self, verb) as exchange:
            call, ticket = await exchange.accept(request, parse, check)
            generation = await exchange.wait(edge.wait_for(ticket, request))
            return await exchange.write(write, call, generation)


class Exchange:
    """One request and its answer, in steps that are called in order within ``with``; leaving it writes the log line.

    Args:
        serving: whose.
        verb: what the log calls it.
    """

    def __init__(self, serving: Serving, verb: str) -> None:
        self._serving = serving
        self._verb = verb
        self._started = self._submitted = time.monotonic()
        self._model: Model | None = None
        self._accepted = False
        self._generation: Generation | None = None

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        fault = error if isinstance(error, RuntimeFault) else None
        if isinstance(error, asyncio.CancelledError):
            fault = ShuttingDown()  # as `edge.Edge` tells the caller
        if fault is not None and not self._accepted:
            self._serving.telemetry.rejected(fault.code)
        if self._serving.settings.enable_latency_logging:
            self._log(200 if error is None else edge.HTTP_STATUS[fault.code] if fault else 500)

    async def accept(
        self,
        request: Request,
        parse: Callable[[bytes], C],
        check: Callable[[C, Sequence[GenerateRequest]], None] | None = None,
        listener: Listener | None = None,
    ) -> tuple[C, Ticket]:
        """Find the model, read the body, fill in defaults and take places in the queue, or join the same request where
        it came before. Nothing is kept of what was sent but what is painted from.

        Raises:
            RuntimeFault: it is refused.
        """
        self._model = model = self._serving.repository.get(
            request.path_params["model_name"], request.path_params.get("model_version")
        )
        model.require_ready()
        async with self._serving.bodies.read(request) as body:

            def read() -> tuple[C, Once | None]:
                return parse(body), edge.once(request, body)

            call, once = read() if len(body) <= INLINE_BYTES else await asyncio.to_thread(read)
            ticket = await self._submit(model, call, check, listener, once)
            return call.without_requests(), ticket

    async def _submit(
        self,
        model: Model,
        call: C,
        check: Callable[[C, Sequence[GenerateRequest]], None] | None,
        listener: Listener | None,
        once: Once | None,
    ) -> Ticket:
        # Taking long prompts apart, planning steps and reading images would keep the event loop from answering health.
        with_image = any(request.image is not None for request in call.requests)
        async with self._serving.image_readers if with_image else contextlib.nullcontext():
            requests = await asyncio.to_thread(model.resolve, call.requests)
        if check is not None:
            check(call, requests)
        ticket = model.submit(
            requests,
            call.timeout,
            listener,
            priority=call.priority,
            preview=call.preview,
            once=once,
            request_id=request_id.get(),
        )
        self._accepted = True
        self._submitted = time.monotonic()
        self._serving.telemetry.preprocess.observe(self._submitted - self._started)
        return ticket

    async def wait(self, generation: Awaitable[Generation]) -> Generation:
        """The pictures, and the seconds that they took."""
        self._generation = await generation
        self._serving.telemetry.predict.observe(time.monotonic() - self._submitted)
        return self._generation

    async def write(self, write: Callable[[C, Generation], A], call: C, generation: Generation) -> A:
        started = time.monotonic()
        answer = await asyncio.to_thread(write, call, generation)
        self._serving.telemetry.postprocess.observe(time.monotonic() - started)
        return answer

    def _log(self, status: int) -> None:
        # Named is only what the server itself is called.
        fields: dict[str, object] = {"model": self._model.name if self._model else "-", "status": status}
        if self._generation is not None:
            fields["images"] = len(self._generation.images)
            for stage in ("queue", "denoise", "decode", "encode"):
                fields[f"{stage}_s"] = round(getattr(self._generation.timings, stage), 4)
        fields["total_s"] = round(time.monotonic() - self._started, 4)
        logger.info(self._verb, extra={"fields": fields})
