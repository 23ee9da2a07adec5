"""Input images as callers should not send them: each gets its status and one sentence, and costs next to nothing."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import Server
from tests.e2e.test_bad_input import (
    INFER,
    JSON_LENGTH,
    PATIENCE,
    ids,
    infer,
    message,
    paint,
    peak_memory,
    prompt,
    refused,
    tensor,
    unfinished_images,
)
from tests.waiting import until


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as connection:
        yield connection


@pytest.fixture(autouse=True, scope="module")
def _nobody_else_notices(server: Server, client: httpx.Client) -> Iterator[None]:
    log_before, picture = len(server.log()), paint(client)
    yield
    assert paint(client) == picture
    until(lambda: unfinished_images(server) == 0, "a request is still held")
    assert "Traceback" not in server.log()[log_before:], server.log()[log_before:]


def encoded(size: tuple[int, int] = (64, 64), image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """Claims a size; holds next to nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND")


def image(*files: bytes, name: str = "image") -> dict[str, Any]:
    return tensor(name, *(base64.b64encode(file).decode() for file in files), datatype="BYTES")


def pixels(name: str, shape: list[int], *data: int, **fields: Any) -> dict[str, Any]:
    return tensor(name, *data, datatype="UINT8", shape=shape, **fields)


GOOD = encoded()


@pytest.mark.parametrize(
    ("content", "says"),
    ids(
        [
            ("no base64", message(prompt(), tensor("image", "*", datatype="BYTES")), "in JSON as base64"),
            ("an empty text", message(prompt(), image(b"")), "image is no PNG, JPEG or WebP file"),
            (
                "a data URL in words",
                message(prompt(), tensor("image", "data:,hello", datatype="BYTES")),
                "without ';base64,'",
            ),
            ("a GIF", message(prompt(), image(encoded(image_format="GIF"))), "image is no PNG, JPEG or WebP file"),
            ("a TIFF", message(prompt(), image(encoded(image_format="TIFF"))), "image is no PNG, JPEG or WebP file"),
            ("a BMP", message(prompt(), image(encoded(image_format="BMP"))), "image is no PNG, JPEG or WebP file"),
            ("an SVG", message(prompt(), image(b"<svg/>")), "image is no PNG, JPEG or WebP file"),
            ("half a PNG", message(prompt(), image(GOOD[: len(GOOD) // 2])), "image cannot be read"),
            (
                "a bomb",
                message(prompt(), image(png(30_000, 30_000))),
                "has 30000 x 30000 pixels; all images of a request",
            ),
            ("no width", message(prompt(), image(png(0, 64))), "image cannot be read"),
            ("a million texts", message(prompt(), image(png(8, 8, chunk(b"tEXt", b"a\0b") * 10**6))), "cannot be read"),
            ("an odd size", message(prompt(), image(encoded((65, 64))), parameters={}), "both must be multiples of 8"),
            ("two for one prompt", message(prompt(), image(GOOD, GOOD)), "image has 2 values; it needs 1"),
            ("a mask alone", message(prompt(), image(GOOD, name="mask_image")), "mask_image needs the input image."),
            ("no strength left", message(prompt(), image(GOOD), parameters={"strength": 0.01}), "leaves no step"),
            ("in two dimensions", message(prompt(), image(GOOD) | {"shape": [1, 1]}), "shape must be [1] or [n]"),
            (
                "as fractions",
                message(prompt(), tensor("image", 0.5, datatype="FP32")),
                "must be BYTES or UINT8, not FP32.",
            ),
            ("four channels", message(prompt(), pixels("image", [1, 1, 4], 1, 2, 3, 4)), "[h, w, 3] or [n, h, w, 3]"),
            ("one channel", message(prompt(), pixels("image", [1, 2], 1, 2)), "[h, w, 3] or [n, h, w, 3]"),
            ("no pixel", message(prompt(), pixels("image", [0, 8, 3])), "exactly one of data"),
            ("a colour of 256", message(prompt(), pixels("image", [1, 1, 3], 0, 0, 256)), "does not fit UINT8."),
            (
                "a mask in colours",
                message(prompt(), image(GOOD), pixels("mask_image", [1, 1, 3], 1, 2, 3)),
                "[h, w] or",
            ),
            ("too many numbers", message(prompt(), pixels("image", [2000, 2000, 3], 0)), "at most 3145728 elements"),
            (
                "sizes without end",
                message(prompt(), pixels("image", [2**40, 2**40, 3], 0)),
                "more elements than a request",
            ),
        ]
    ),
)
def test_each_is_told_what_is_wrong_with_it(client: httpx.Client, content: Any, says: str) -> None:
    refused(infer(client, content), 400, says)


def binary(client: httpx.Client, shape: list[int], data: bytes, size: int | None = None) -> httpx.Response:
    given = pixels("image", shape, parameters={"binary_data_size": len(data) if size is None else size})
    raw = json.dumps(message(prompt(), given, parameters={"num_inference_steps": 1, "strength": 1.0})).encode()
    return infer(client, raw + data, headers={JSON_LENGTH: str(len(raw))})


def test_bytes_that_are_not_those_of_the_shape_are_refused(client: httpx.Client) -> None:
    assert binary(client, [64, 64, 3], bytes(64 * 64 * 3)).status_code == 200
    refused(binary(client, [64, 64, 3], bytes(64 * 64 * 3 - 1)), 400, "needs 12288 bytes, got 12287.")
    refused(binary(client, [64, 64, 3], bytes(9), size=64 * 64 * 3), 400, "9 bytes are left.")


def test_every_way_to_send_one_image_paints_the_same_picture(client: httpx.Client) -> None:
    parameters = {"num_inference_steps": 2, "strength": 1.0, "seed": 7}
    text = base64.b64encode(GOOD).decode()
    data = np.asarray(Image.open(io.BytesIO(GOOD))).tobytes()
    ways = [
        image(GOOD),
        tensor("image", f"data:image/png;base64,{text}", datatype="BYTES"),
        tensor("image", "\n".join(text[i : i + 60] for i in range(0, len(text), 60)), datatype="BYTES"),
        image(encoded(image_format="WEBP", lossless=True)),
        pixels("image", [64, 64, 3], *data),
        pixels("image", [1, 64, 64, 3], *data),
    ]
    pictures = set()
    for way in ways:
        answer = client.post(INFER, json=message(prompt(), way, parameters=parameters))
        assert answer.status_code == 200, answer.text
        pictures.add(answer.json()["outputs"][0]["data"][0])
    assert len(pictures) == 1


def test_sixteen_bombs_cost_neither_memory_nor_the_probes_their_answer(server: Server, client: httpx.Client) -> None:
    big = encoded((4096, 4096))
    before = peak_memory(server)
    body = message(prompt(*"abcdefghijklmnop"), image(*[big + bytes([i]) for i in range(16)]))
    refused(infer(client, body), 400, "all images of a request may have 16777216 together")
    assert client.get("/v2/health/live").elapsed.total_seconds() < 5
    assert peak_memory(server) - before < 600e6
