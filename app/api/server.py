"""The HTTP server: uvicorn with bounded headers, and with an end at which nobody finds a closed door.

Knows no routes and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api import edge
from app.api.tls import Certificate
from app.errors import InvalidRequest

logger = logging.getLogger(__name__)

LAST_SECONDS = 1.0
"""Of the grace period, kept for the answers of requests that were not done in time, and for the end itself."""
TICK = 0.05
TICKS = 10
"""Of uvicorn's own, in a second."""
MOST_PIPELINED = 64 * 1024
"""Bytes of further requests that are read while one is answered."""
EVENTS_AT_A_TIME = 200
"""Of one connection, until the others have had their turn: of a body in chunks of a byte 40,000 are read at once, and
take a second."""
BYTES_ACKED = (120, 8)
"""Where ``tcpi_bytes_acked`` is in Linux's ``struct tcp_info``, and its size."""


class Server(uvicorn.Server):
    """uvicorn, except that it goes on answering while accepted requests are finished.

    uvicorn closes its listeners as soon as it is told to end, so that probes and new requests find nobody. Here they
    are answered until the last accepted request is done: not ready, and 503. A second signal ends that at once.

    Args:
        config: uvicorn's.
        stop: takes no more requests and returns when all accepted ones are over, after the given seconds at the
            latest; called on a thread of its own.
        hurry: makes `stop` return.
        grace_period: seconds from the signal to the end.
        certificate: to serve HTTPS with; HTTP unless given.
        handshake_timeout: seconds from connecting until HTTPS is agreed on.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        stop: Callable[[float], None],
        hurry: Callable[[], None],
        grace_period: float,
        certificate: Certificate | None = None,
        handshake_timeout: float = 30.0,
    ) -> None:
        super().__init__(config)
        self._stop = stop
        self._hurry = hurry
        self._grace_period = grace_period
        self._in_a_hurry = False
        self._certificate = certificate
        self._handshake_timeout = handshake_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        self._in_a_hurry = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._certificate is None or sockets is None:
            await super().startup(sockets)
            return
        # uvicorn would wait a minute for a handshake, longer than for all else, and reads the files a second time.
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        for listener in sockets:
            listening = await loop.create_server(
                self._connect,
                sock=listener,
                ssl=self._certificate,
                ssl_handshake_timeout=self._handshake_timeout,
                backlog=self.config.backlog,
            )
            self.servers.append(listening)

    def _connect(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        connection: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return connection

    async def on_tick(self, counter: int) -> bool:
        if self._certificate is not None and counter % TICKS == 0:
            self._certificate.renew()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        patience = max(self._grace_period - LAST_SECONDS, self._grace_period / 2)
        # Half of what is left then is for answers to go out, and half for the end.
        deadline = time.monotonic() + (patience + self._grace_period) / 2
        logger.info("shutting down: accepted requests have %.1f seconds", patience)
        stopping = asyncio.ensure_future(asyncio.to_thread(self._stop, patience))
        while not stopping.done():
            if self._in_a_hurry:
                self._hurry()
            await self.on_tick(0)  # keeps the Date header true
            await asyncio.wait([stopping], timeout=TICK)
        stopping.result()

        closing = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait([closing], timeout=TICK)
        while not closing.done():
            if self._in_a_hurry or time.monotonic() > deadline:
                await self._break_off()
            await asyncio.wait([closing], timeout=TICK)
        closing.result()

    async def _break_off(self) -> None:
        """End what still runs, such as a body that does not arrive, and connections whose client does not read."""
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_SECONDS / 4)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class Portions(h11.Connection):
    """h11's parser, which says after so many events that it has no more.

    Attributes:
        left: events until then.
    """

    left = 0

    def next_event(self) -> Any:
        if not self.left:
            return h11.NEED_DATA
        self.left -= 1
        return super().next_event()


class Flow(FlowControl):
    """Whether uvicorn wants to read, which counts only when all that was read before is handed out.

    Attributes:
        is_held: it is not, and nothing is read.
    """

    is_held = False

    def hold(self) -> None:
        if not self.read_paused:
            self._transport.pause_reading()
        self.is_held = True

    def release(self) -> None:
        self.is_held = False
        if not self.read_paused:
            self._transport.resume_reading()

    def pause_reading(self) -> None:
        if self.is_held:
            self.read_paused = True
        else:
            super().pause_reading()

    def resume_reading(self) -> None:
        if self.is_held:
            self.read_paused = False
        else:
            super().resume_reading()


class Connection(H11Protocol):
    """uvicorn's connection, closed when a request's headers do not arrive in time, or nobody takes an answer.

    uvicorn itself waits forever for the rest of a line, and for a client that does not read, and has everybody wait for
    a body in tiny chunks. This parser, unlike httptools, bounds the headers' size. What is no HTTP gets an error with
    the same body as all others.

    Args:
        timeout: seconds from connecting, or from a request's first byte, to the end of its headers; and seconds in
            which a client has to take something of an answer that waits for it.
        uvicorn: what uvicorn gives its connections.
    """

    conn: Portions
    flow: Flow

    def __init__(self, *, timeout: float, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.conn = Portions(h11.SERVER)
        self._timeout = timeout
        self._headers_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def handle_events(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.DONE, h11.MUST_CLOSE):
            # Some clients send an empty line behind a body: RFC 9112, 2.2. h11 offers no other way to pass over it.
            data, _ = self.conn.trailing_data
            self.conn._receive_buffer.maybe_extract_at_most(len(data) - len(data.lstrip(b"\r\n")))
        self.conn.left = EVENTS_AT_A_TIME
        super().handle_events()
        if not self.conn.left and not self.flow.is_held:
            self.flow.hold()
            self.loop.call_soon(self._go_on)
        whole = self.conn.their_state is h11.DONE
        if whole and self._is_answering and len(self.conn.trailing_data[0]) < MOST_PIPELINED:
            # uvicorn stops reading where the next request comes early, and would not hear of a client that leaves.
            self.flow.resume_reading()

    def _go_on(self) -> None:
        """The next events, others having had their turn."""
        if not self.transport.is_closing():
            self.flow.release()
            self.handle_events()
            self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching_headers()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing to say: a client that asks for HTTP/2, as some do each time, is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        del msg
        # Nonsense may also follow a request that is answered already.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = edge.error_response(InvalidRequest("This is no HTTP request that can be understood."))
            headers = [*response.raw_headers, (b"connection", b"close")]
            start = h11.Response(status_code=response.status_code, headers=headers, reason=b"Bad Request")
            has_body = not self._is_answering or self.scope["method"] != "HEAD"
            for event in (start, *([h11.Data(data=bytes(response.body))] if has_body else ()), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self._is_answering:
            # That was its answer; a second one would be an error.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_headers(self) -> None:
        if self._is_answering:
            self._stop_watching_headers()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self._timeout, self.transport.close)

    def _stop_watching_headers(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _watch_reader(self) -> None:
        if self._reader_timer is None:
            progress = untaken, _ = self._progress()
            if untaken:
                self._reader_timer = self.loop.call_later(self._timeout, self._check_reader, progress)

    def _progress(self) -> tuple[int, bytes]:
        """Bytes that the client has not taken and, where the system says so, how many it has.

        Not the transport's own buffer alone: with TLS another one behind it holds what was written, and the system asks
        for more only when it has room for a megabyte, for which a slow client takes long.
        """
        untaken, taken = self.transport.get_write_buffer_size(), b""
        connection = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            untaken += struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        with contextlib.suppress(OSError, AttributeError), socket.socket(fileno=os.dup(connection.fileno())) as same:
            taken = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, sum(BYTES_ACKED))[BYTES_ACKED[0] :]
        return untaken, taken

    def _check_reader(self, before: tuple[int, bytes]) -> None:
        self._reader_timer = None
        # While more may be written, as much may have been taken as was added.
        is_all = self.flow.write_paused or not self._is_answering
        if is_all and self._progress() == before:
            logger.info("a client took nothing of its answer for %g seconds: its connection is closed", self._timeout)
            self.transport.abort()
        else:
            self._watch_reader()
