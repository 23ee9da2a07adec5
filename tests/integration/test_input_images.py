"""Input images over ASGI: read away from the event loop, few at a time, once each, and not for a refused request."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from app import images
from app.api import edge, oip
from app.engine import repository
from app.generation import GenerateRequest, Pixels
from app.protocol.infer_request import parse_infer
from tests.fakes import Instant, Narrow
from tests.integration.test_app import INFER, running


def encoded(size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def message(*files: bytes, prompts: int = 1, **parameters: Any) -> dict[str, Any]:
    texts = [base64.b64encode(file).decode() for file in files]
    inputs = [
        {"name": "prompt", "shape": [prompts], "datatype": "BYTES", "data": ["a"] * prompts},
        {"name": "image", "shape": [len(texts)], "datatype": "BYTES", "data": texts},
    ]
    return {"inputs": inputs, "parameters": parameters}


class Remembers(Instant):
    """Keeps the requests that it is asked to resolve."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[GenerateRequest] = []

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        self.requests.append(request)
        return super().resolve(request)


async def test_large_bodies_and_images_are_read_away_from_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, threading.Thread] = {}

    def parse(*arguments: Any) -> Any:
        threads["parse"] = threading.current_thread()
        return parse_infer(*arguments)

    def once(*arguments: Any) -> Any:
        threads["once"] = threading.current_thread()
        return make_once(*arguments)

    def decode(files: Iterable[Any], max_pixels: int) -> Iterator[Pixels]:
        threads["decode"] = threading.current_thread()
        return images.decode_images(files, max_pixels)

    make_once = edge.once
    monkeypatch.setattr(oip, "parse_infer", parse)
    monkeypatch.setattr(edge, "once", once)
    monkeypatch.setattr(repository, "decode_images", decode)
    async with running(Instant) as client:
        padded = encoded() + bytes(20_000_000)
        answer = await client.post(INFER, json=message(padded), headers={edge.IDEMPOTENCY_KEY: "k"})
        assert answer.status_code == 200
    assert set(threads) == {"parse", "once", "decode"}
    assert threading.current_thread() not in threads.values()


async def test_no_more_images_are_read_at_a_time_than_there_are_threads_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, go_on = 0, 0, threading.Event()
    lock = threading.Lock()

    def decode(files: Iterable[Any], max_pixels: int) -> Iterator[Pixels]:
        nonlocal inside, most
        if not files:
            return iter(())
        with lock:
            inside += 1
            most = max(most, inside)
        assert go_on.wait(30)
        with lock:
            inside -= 1
        return images.decode_images(files, max_pixels)

    monkeypatch.setattr(repository, "decode_images", decode)
    async with running(Instant, encode_threads=2) as client:
        sent = [asyncio.ensure_future(client.post(INFER, json=message(encoded()))) for _ in range(6)]
        while inside < 2:
            await asyncio.sleep(0.005)
        # Others are not held up meanwhile.
        for _ in range(20):
            assert (await client.get("/v2/health/live")).status_code == 200
        without_image = {"inputs": message()["inputs"][:1]}
        assert (await client.post(INFER, json=without_image)).status_code == 200
        go_on.set()
        assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}
    assert most == 2


async def test_one_image_for_several_prompts_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def decode(files: Iterable[Any], max_pixels: int) -> Iterator[Pixels]:
        nonlocal read
        files = list(files)
        read += len(files)
        return images.decode_images(files, max_pixels)

    monkeypatch.setattr(repository, "decode_images", decode)
    family = Remembers()
    async with running(lambda: family, max_input_pixels=256) as client:
        assert (await client.post(INFER, json=message(encoded(), prompts=4))).status_code == 200
        assert read == 1
        four = [encoded() + bytes([i]) for i in range(4)]
        refused = await client.post(INFER, json=message(*four, prompts=4))
        assert refused.status_code == 400
        assert refused.json()["error"].startswith("Prompt 2 of 4: image has 16 x 16 pixels; all images of a request")
    pictures = [request.image for request in family.requests if request.image is not None]
    assert len(pictures) == 4 and len(set(map(id, pictures))) == 1
    assert pictures[0] == Pixels(bytes([255, 0, 0]) * 256, 16, 16)


@pytest.mark.parametrize(
    ("files", "prompts", "says"),
    [
        ((encoded(), b"no picture", encoded((8, 8))), 3, "Prompt 2 of 3: image is no PNG, JPEG or WebP file"),
        ((encoded()[:48], encoded()), 2, "Prompt 1 of 2: image cannot be read"),
        ((encoded()[:48],), 3, "image cannot be read"),
        ((b"no picture", b"no picture"), 2, "image is no PNG, JPEG or WebP file"),
        ((b"no picture",), 1, "image is no PNG, JPEG or WebP file"),
    ],
)
async def test_whose_image_cannot_be_read_is_said_unless_it_serves_every_prompt(
    files: tuple[bytes, ...], prompts: int, says: str
) -> None:
    async with running(Instant) as client:
        refused = await client.post(INFER, json=message(*files, prompts=prompts))
    assert refused.status_code == 400 and refused.json()["error"].startswith(says), refused.text


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"eta": 0.5}, "does not take eta"),
        ({"denoising_end": 0.0}, "does not take denoising_end"),
        ({"width": 100}, "multiple"),
    ],
)
async def test_what_the_model_does_not_take_is_refused_before_images_are_read(
    monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], says: str
) -> None:
    def decode(files: Iterable[Any], max_pixels: int) -> Iterator[Pixels]:
        assert "width" in parameters, "the image was read"
        return images.decode_images(files, max_pixels)

    monkeypatch.setattr(repository, "decode_images", decode)
    async with running(Narrow) as client:
        refused: httpx.Response = await client.post(INFER, json=message(encoded(), **parameters))
    assert refused.status_code == 400 and says in refused.json()["error"]
