"""The bodies of requests: read within their limits, and so many bytes of them at a time."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import zlib
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from app.errors import BodyTooLarge, BodyTooSlow, Cancelled, InvalidRequest, Overloaded, UnsupportedEncoding
from app.sentences import describe
from app.settings import Settings

SMALL = 64 * 1024
"""Bytes of a body that is read whatever else is: no more than the connection itself may hold."""
AT_A_TIME = 8
"""Bodies of the largest size that are held at a time, or more smaller ones."""
RETRY_AFTER = 5.0
"""Seconds after which those who found no room may try again."""
PLAIN = ("identity", "")
GZIP = b"\x1f\x8b"
"""With which gzip data begins, and each of its members."""
MOST_MEMBERS = 1000
"""Of gzip data; each may unpack to nothing, and costs time all the same."""


class Bodies:
    """Reads bodies. Those that find no room wait where they are, in their client's connection.

    Args:
        settings: for the limits of one body.
    """

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.max_body_size
        self._timeout = settings.body_timeout
        self._free = AT_A_TIME * settings.max_body_size
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, unpacked, for as long as it has its room in memory.

        Raises:
            BodyTooLarge: declared or sent, packed or unpacked, more than ``max_body_size``.
            BodyTooSlow: not whole after ``body_timeout`` seconds.
            Cancelled: the client closed the connection first.
            InvalidRequest: the packed data is damaged.
            Overloaded: there was no room for ``body_timeout`` seconds.
            UnsupportedEncoding: neither gzip nor deflate.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in (*PLAIN, "gzip", "x-gzip", "deflate"):
            raise UnsupportedEncoding(
                f"The content encoding {describe(encoding)} is not spoken here; use gzip or deflate."
            )
        with contextlib.ExitStack() as held:
            yield await self._read(request, encoding, held)

    def _most(self, request: Request, encoding: str) -> int:
        """Bytes that the body may come to."""
        declared = request.headers.get("content-length", "")
        size = int(declared[:20]) if declared.isdecimal() else self._limit
        if size > self._limit:
            raise self._too_large()
        return size if encoding in PLAIN else size + self._limit

    async def _read(self, request: Request, encoding: str, held: contextlib.ExitStack) -> bytes:
        most = self._most(request, encoding)
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout) as patience:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._limit:
                        raise self._too_large()
                    if len(body) - len(chunk) <= SMALL < len(body):
                        patience.reschedule(None)  # the wait is no fault of the client's
                        await self._take(most, held)
                        patience.reschedule(asyncio.get_running_loop().time() + self._timeout)
        except TimeoutError:
            raise BodyTooSlow(f"The body did not arrive within {self._timeout:g} seconds.") from None
        except ClientDisconnect:
            raise Cancelled("The client closed the connection before its body was whole.") from None
        if encoding in PLAIN:
            return bytes(body)
        if len(body) <= SMALL:
            # Most of what is packed this small stays so, and needs no room.
            few = min(SMALL, self._limit)
            unpacked = _unpack(bytes(body), encoding, few)
            if len(unpacked) <= few:
                return unpacked
            await self._take(most, held)
        unpacked = await asyncio.to_thread(_unpack, bytes(body), encoding, self._limit)
        if len(unpacked) > self._limit:
            raise self._too_large()
        return unpacked

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body has more than {self._limit} bytes (the server's setting max_body_size).")

    # --- Room --------------------------------------------------------------------------------------------------

    async def _take(self, size: int, held: contextlib.ExitStack) -> None:
        """Wait for `size` bytes of room, which are given back when `held` ends.

        Raises:
            Overloaded: there was none for ``body_timeout`` seconds.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._let_in()
        try:
            async with asyncio.timeout(self._timeout):
                await turn
        except BaseException as error:
            if not turn.cancel() and not turn.cancelled():
                self._give_back(size)  # it came together with what ended the wait
            self._let_in()
            if isinstance(error, TimeoutError):
                sentence = "The server holds as many large bodies as it has room for; send this one again later."
                raise Overloaded(sentence, RETRY_AFTER) from None
            raise
        held.callback(self._give_back, size)

    def _give_back(self, size: int) -> None:
        self._free += size
        self._let_in()

    def _let_in(self) -> None:
        """In the order in which they came, so that a large one does not wait for ever."""
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():
                if size > self._free:
                    return
                self._free -= size
                turn.set_result(None)
            self._waiting.popleft()


def _unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """At most ``limit + 1`` bytes of the unpacked body."""
    if encoding in ("gzip", "x-gzip"):
        window = zlib.MAX_WBITS | 16
    else:
        # "deflate" means zlib's format, but some clients send it without zlib's header.
        zlib_header = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
        window = zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS
    view, position, unpacked = memoryview(body), 0, bytearray()
    unpacker, members = zlib.decompressobj(window), 1
    try:
        while position < len(body) and len(unpacked) <= limit:
            if unpacker.eof:
                # gzip data may have several members, which belong together.
                if not body.startswith(GZIP, position) or window <= zlib.MAX_WBITS or members == MOST_MEMBERS:
                    break
                unpacker, members = zlib.decompressobj(window), members + 1
            piece = view[position : position + SMALL]  # as what a member leaves is copied
            unpacked += unpacker.decompress(piece, limit + 1 - len(unpacked))
            position += len(piece) - len(unpacker.unused_data)
    except zlib.error:
        raise InvalidRequest(f"The body is not {encoding} data as its Content-Encoding says.") from None
    if len(unpacked) <= limit and (position < len(body) or not unpacker.eof):
        raise InvalidRequest(f"The {encoding} data of the body does not end where the body ends.")
    return bytes(unpacked)
