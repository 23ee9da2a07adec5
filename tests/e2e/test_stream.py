"""Streams over a real socket, as the README shows them to curl, and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.conftest import REPOSITORY, Server
from tests.waiting import until

STREAM = "/v2/models/sdxl/generate_stream"
TIMEOUT = 300.0
BODY = {"prompt": "a red circle on a white background", "height": 64, "width": 64, "seed": 7}


def commands(section: str) -> list[str]:
    """The curl commands of one section of the README."""
    text = Path(REPOSITORY / "README.md").read_text(encoding="utf-8")
    part = text.split(f"\n### {section}\n")[1].split("\n### ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]


def run(command: str, server: Server) -> str:
    words = shlex.split(command.replace("localhost:8080", server.host))
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout


def events(text: str) -> Iterator[tuple[str, Any]]:
    for block in text.removesuffix("\n\n").split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_the_readmes_curl_hears_of_every_step_and_asks_about_it_afterwards(server: Server) -> None:
    paint, ask, cancel = commands("Progress")
    found = list(events(run(paint, server)))
    assert [name for name, _ in found] == ["queued", "step", "step", "step", "done"]
    assert found[0][1]["request_id"] == "my-circle" and found[0][1]["remaining_seconds"] > 0
    picture = Image.open(io.BytesIO(base64.b64decode(found[-1][1]["outputs"][0]["data"][0])))
    assert picture.size == (128, 128)
    done = {"id": "my-circle", "state": "done", "step": 3, "steps": 3}
    assert json.loads(run(ask, server)) == json.loads(run(cancel, server)) == done


def test_a_stream_gives_the_picture_that_infer_gives(server: Server) -> None:
    body = {**BODY, "num_inference_steps": 4, "preview": "latents", "preview_every": 2}
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
        found = dict(events(client.post(STREAM, json=body).text))
        plain = client.post("/v2/models/sdxl/generate", json={**BODY, "num_inference_steps": 4}).json()
    assert found["done"]["outputs"] == plain["outputs"]
    preview = Image.open(io.BytesIO(base64.b64decode(found["preview"]["data"])))
    assert preview.format == "JPEG" and max(preview.size) <= 64


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_a_client_that_hangs_up_costs_no_further_step(server: Server, path: str) -> None:
    body = json.dumps({**BODY, "num_inference_steps": 150}).encode()
    head = f"POST /v2/models/sdxl/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    cancelled = server.metric("sdxl_cancelled_total")
    steps = server.metric("sdxl_steps_total")
    with socket.create_connection(("127.0.0.1", int(server.host.split(":")[1])), TIMEOUT) as connection:
        connection.sendall(head + body)
        until(lambda: server.metric("sdxl_steps_total") > steps)
    until(lambda: server.metric("sdxl_cancelled_total") == cancelled + 1)
    steps = server.metric("sdxl_steps_total")
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
        answer = client.post("/v2/models/sdxl/generate", json={**BODY, "num_inference_steps": 1})
    assert answer.status_code == 200
    # At most the one that was under way when it was cancelled.
    assert server.metric("sdxl_steps_total") <= steps + 2
    assert server.metric("sdxl_running_images") == server.metric("sdxl_pending_images") == 0


async def test_a_short_request_behind_eight_long_ones_is_done_long_before_them(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT) as client:

        async def paint(seed: int, steps: int) -> int:
            body = {**BODY, "seed": seed, "num_inference_steps": steps}
            assert (await client.post("/v2/models/sdxl/generate", json=body)).status_code == 200
            order.append(seed)
            return seed

        order: list[int] = []
        long = [asyncio.ensure_future(paint(seed, 50)) for seed in range(8)]
        while server.metric("sdxl_running_images") < 8:
            await asyncio.sleep(0.01)
        before = server.metric("sdxl_images_per_forward_pass_count")
        await paint(99, 4)
        passes = server.metric("sdxl_images_per_forward_pass_count") - before
        await asyncio.gather(*long)
    assert order[0] == 99
    assert passes <= 2 * 4 + 2, "4 steps, and what was under way before and after them"


async def test_mixed_load_leaves_nothing_behind_and_everybody_gets_the_picture_of_the_seed(server: Server) -> None:
    failed = server.metric("sdxl_failed_total")
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT) as client:
        bodies = [
            {**BODY, "seed": seed, "num_inference_steps": 2 + seed % 3, "guidance_scale": (1.0, 5.0)[seed % 2]}
            for seed in range(6)
        ]
        alone = [(await client.post("/v2/models/sdxl/generate", json=body)).json()["outputs"][1] for body in bodies]

        async def paint(number: int) -> Any:
            body = bodies[number % 6]
            if number % 3 == 0:
                request = client.post("/v2/models/sdxl/generate", json=body, timeout=0.05)
                try:
                    return (await request).json()["outputs"][1] == alone[number % 6]
                except httpx.TimeoutException:
                    return True
            if number % 3 == 1:
                text = (await client.post(STREAM, json={**body, "preview": "latents", "preview_every": 1})).text
                return dict(events(text))["done"]["outputs"][1] == alone[number % 6]
            return (await client.post("/v2/models/sdxl/generate", json=body)).json()["outputs"][1] == alone[number % 6]

        assert all(await asyncio.gather(*map(paint, range(60))))
    until(lambda: server.metric("sdxl_running_images") + server.metric("sdxl_pending_images") == 0)
    assert server.metric("sdxl_open_streams") == 0
    assert server.metric("sdxl_failed_total") == failed
