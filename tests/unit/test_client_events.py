"""Streamed answers as the client reads them: wherever the bytes are cut, and whatever is wrong with them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from clients.client import ServerError, UnreachableError
from clients.events import StreamReader
from tests.unit.test_client import Ask, ask  # noqa: F401 (a fixture)

ANSWER = {
    "model_name": "sdxl",
    "outputs": [
        {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["iVBORw=="]},
        {"name": "seed", "shape": [1], "datatype": "INT64", "data": [7]},
    ],
    "parameters": {"content_type": "image/png"},
}


def event(name: str, fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(fields)}\n\n".encode()


STREAM = (
    event("queued", {"place": 1, "steps": 2})
    + b": still here\n\n"
    + event("step", {"step": 1, "steps": 2})
    + event("preview", {"image": 0, "data": "/9j/"})
    + event("step", {"step": 2, "steps": 2})
    + event("done", ANSWER)
)


def streaming(content: bytes) -> Callable[[httpx.Request], httpx.Response]:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v2/models/sdxl/infer_stream"
        assert request.headers["content-type"] == "application/json", "events are text"
        return httpx.Response(200, content=content, headers={"Content-Type": "text/event-stream"})

    return handler


def test_a_line_of_megabytes_is_put_together_once() -> None:
    """In time that grows with its length: with the square of it, 64 MB took most of a minute."""
    reader = StreamReader(lambda done, total: None)
    pieces = [b"event: done\ndata: {", *[b'"x":0,'] * 200_000, b'"y":1}\n', b"\n"]
    largest = 0
    for piece in pieces:
        reader.feed(piece)
        largest = max(largest, len(reader._pending[-1]))
    assert largest < 10, "no piece is copied before its line is whole"
    assert reader.finish().json() == {"x": 0, "y": 1}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_stream_is_read_wherever_it_is_cut(size: int, line_end: bytes) -> None:
    steps: list[tuple[int, int]] = []
    reader = StreamReader(lambda done, total: steps.append((done, total)))
    content = STREAM.replace(b"\n", line_end)
    for start in range(0, len(content), size):
        reader.feed(content[start : start + size])
    assert steps == [(1, 2), (2, 2)]
    assert reader.finish().json() == ANSWER


def test_a_picture_comes_with_its_steps(ask: Ask) -> None:  # noqa: F811
    steps: list[tuple[int, int]] = []
    result = ask(streaming(STREAM), "generate", "p", on_step=lambda done, total: steps.append((done, total)))
    assert [picture.seed for picture in result.pictures] == [7]
    assert steps == [(1, 2), (2, 2)]


def test_an_error_is_the_servers_own_sentence_before_a_stream_and_in_it(ask: Ask) -> None:  # noqa: F811
    failed = event("error", {"error": "The device has too little memory.", "code": "out_of_memory", "status": 507})
    with pytest.raises(ServerError, match="too little memory") as later:
        ask(streaming(failed), "generate", "p", on_step=lambda *_: None)
    assert later.value.status == 507
    with pytest.raises(ServerError, match="no such model"):
        ask(lambda _: httpx.Response(404, json={"error": "no such model"}), "generate", "p", on_step=lambda *_: None)


def test_an_answer_is_waited_for_no_longer_while_its_steps_are_told(ask: Ask) -> None:  # noqa: F811
    class Slow(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for step in range(1, 101):
                time.sleep(0.01)
                yield event("step", {"step": step, "steps": 100})
            yield event("done", ANSWER)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for data in self:
                yield data

    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Slow(), headers={"Content-Type": "text/event-stream"})

    with pytest.raises(UnreachableError, match=r"did not answer within 0\.1 seconds"):
        ask(handler, "generate", "p", on_step=lambda *_: None, options={"timeout": 0.1})


def test_an_answer_that_has_begun_may_take_its_time_as_one_in_one_piece_may() -> None:
    reader = StreamReader(lambda *_: None, timeout=0.5)
    content = event("done", ANSWER)
    reader.feed(content[:50])
    time.sleep(0.6)
    for byte in content[50:]:
        reader.feed(bytes([byte]))
    assert reader.finish().json() == ANSWER


def test_a_stream_that_breaks_off_is_a_broken_connection(ask: Ask) -> None:  # noqa: F811
    with pytest.raises(UnreachableError, match="broke before the answer was whole"):
        ask(streaming(STREAM[:-3]), "generate", "p", on_step=lambda *_: None)


@pytest.mark.parametrize(
    "content",
    [b"event: step\ndata: {\n\n", event("step", {}), event("step", []), event("error", {}), event("done", [1])],
)
def test_an_event_that_makes_no_sense_is_a_server_error(ask: Ask, content: bytes) -> None:  # noqa: F811
    with pytest.raises(ServerError):
        ask(streaming(content), "generate", "p", on_step=lambda *_: None)


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError])
def test_what_the_callers_own_function_raises_is_the_callers(error: type[Exception]) -> None:
    def on_step(done: int, total: int) -> None:
        raise error("mine")

    with pytest.raises(error, match="mine"):
        StreamReader(on_step).feed(b'event: step\ndata: {"step": 1, "steps": 2}\n\n')
