"""Bodies of requests in memory: so many bytes at a time, and whoever finds no room waits, or is told to come again."""

from __future__ import annotations

import asyncio
import gzip
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fastapi import Request

from app.api.bodies import AT_A_TIME, MOST_MEMBERS, Bodies
from app.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, Overloaded
from app.settings import Settings

LIMIT = 1_000_000


class Sender:
    """A client that sends what a test puts."""

    def __init__(self, declared: int | None, packed: bytes = b"") -> None:
        self._chunks: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        headers = [(b"transfer-encoding", b"chunked")] if declared is None else [(b"content-length", b"%d" % declared)]
        if packed:
            headers.append((b"content-encoding", b"gzip"))
            self._chunks.put_nowait((packed, False))
        self.request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        body, more = await self._chunks.get()
        return {"type": "http.request", "body": body, "more_body": more}

    def send(self, size: int, more: bool = False) -> Sender:
        self._chunks.put_nowait((bytes(size), more))
        return self


def bodies(timeout: float = 60.0) -> Bodies:
    return Bodies(Settings(max_body_size=LIMIT, body_timeout=timeout))


async def hold(stack: AsyncExitStack, all_: Bodies, count: int, declared: int | None = LIMIT) -> None:
    for _ in range(count):
        await stack.enter_async_context(all_.read(Sender(declared).send(LIMIT).request))


async def read(all_: Bodies, sender: Sender) -> int:
    async with all_.read(sender.request) as body:
        return len(body)


@pytest.mark.parametrize("declared", [LIMIT, None], ids=["declared", "chunked"])
async def test_whoever_finds_no_room_waits_for_it_in_turn(declared: int | None) -> None:
    all_ = bodies()
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME - 1, declared)
        async with all_.read(Sender(declared).send(LIMIT).request):
            waiting = [asyncio.create_task(read(all_, Sender(declared).send(LIMIT))) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting)
            # What is small is not held up.
            assert await read(all_, Sender(10).send(10)) == 10
        assert await asyncio.gather(*waiting) == [LIMIT] * 3


async def test_whoever_waits_too_long_is_told_to_come_again_and_leaves_no_gap() -> None:
    all_ = bodies(timeout=0.05)
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)
        with pytest.raises(Overloaded, match="send this one again later") as refused:
            await read(all_, Sender(LIMIT).send(LIMIT))
        assert refused.value.retry_after >= 1
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)


async def test_whoever_leaves_while_waiting_takes_no_room() -> None:
    all_ = bodies()
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)
        gone = [asyncio.create_task(read(all_, Sender(LIMIT).send(LIMIT))) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in gone:
            task.cancel()
        stays = asyncio.create_task(read(all_, Sender(LIMIT).send(LIMIT)))
    assert await stays == LIMIT
    assert all(task.cancelled() for task in gone)
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)


async def test_whoever_leaves_as_its_turn_comes_gives_its_room_back() -> None:
    all_ = bodies(timeout=5)
    stack = AsyncExitStack()
    await hold(stack, all_, AT_A_TIME)
    gone = [asyncio.create_task(read(all_, Sender(LIMIT).send(LIMIT))) for _ in range(3)]
    await asyncio.sleep(0.05)
    await stack.aclose()
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    assert all(task.cancelled() for task in gone)
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)


async def test_where_one_that_finds_no_room_leaves_those_behind_it_that_do_come_in() -> None:
    all_ = bodies()
    packed = gzip.compress(bytes(LIMIT))
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME - 1)
        large = asyncio.create_task(read(all_, Sender(len(packed), packed).send(0)))
        await asyncio.sleep(0.05)
        behind = asyncio.create_task(read(all_, Sender(LIMIT).send(LIMIT)))
        await asyncio.sleep(0.05)
        assert not large.done() and not behind.done()
        large.cancel()
        async with asyncio.timeout(5):
            assert await behind == LIMIT


async def test_a_body_that_is_declared_too_large_is_refused_before_it_comes() -> None:
    all_ = bodies()
    async with asyncio.timeout(5):
        with pytest.raises(BodyTooLarge, match=f"more than {LIMIT} bytes"):
            await read(all_, Sender(LIMIT + 1))


async def test_who_sends_slowly_holds_nothing_until_much_of_it_is_here() -> None:
    all_ = bodies()
    slow = [Sender(LIMIT).send(1000, more=True) for _ in range(2 * AT_A_TIME)]
    reading = [asyncio.create_task(read(all_, sender)) for sender in slow]
    await asyncio.sleep(0.05)
    assert await read(all_, Sender(LIMIT).send(LIMIT)) == LIMIT
    for sender in slow:
        sender.send(LIMIT - 1000)
    assert await asyncio.gather(*reading) == [LIMIT] * len(slow)


async def test_what_is_packed_has_room_for_what_it_unpacks_to_or_waits() -> None:
    all_ = bodies()
    packed = gzip.compress(bytes(LIMIT))
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME - 1)
        waiting = [asyncio.create_task(read(all_, Sender(len(packed), packed))) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
    assert await asyncio.gather(*waiting) == [LIMIT] * 3


async def test_gzip_data_may_have_several_members_but_not_any_number_of_them() -> None:
    all_ = bodies()
    for parts in ([1, 2, 3], [LIMIT // 2, LIMIT // 2], [0] * MOST_MEMBERS):
        packed = b"".join(gzip.compress(bytes(part)) for part in parts)
        assert await read(all_, Sender(len(packed), packed).send(0)) == sum(parts)
    for rest in (gzip.compress(b"a") * MOST_MEMBERS, gzip.compress(b"a")[:-1], b"more"):
        packed = gzip.compress(b"a") + rest
        with pytest.raises(InvalidRequest, match="does not end where the body ends"):
            await read(all_, Sender(len(packed), packed).send(0))
    packed = gzip.compress(bytes(LIMIT)) + gzip.compress(b"a")
    with pytest.raises(BodyTooLarge, match=f"more than {LIMIT} bytes"):
        await read(all_, Sender(len(packed), packed).send(0))


async def test_what_is_small_packed_and_unpacked_is_not_held_up() -> None:
    all_ = bodies()
    packed = gzip.compress(bytes(1000))
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)
        async with asyncio.timeout(5):
            assert await read(all_, Sender(len(packed), packed).send(0)) == 1000


async def test_a_body_that_stops_is_given_up_and_its_room_with_it() -> None:
    all_ = bodies(timeout=0.05)
    for _ in range(2 * AT_A_TIME):
        with pytest.raises(BodyTooSlow):
            await read(all_, Sender(LIMIT).send(LIMIT // 2, more=True))
    async with AsyncExitStack() as stack:
        await hold(stack, all_, AT_A_TIME)
