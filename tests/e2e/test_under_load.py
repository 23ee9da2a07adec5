"""Many at once over the wire: forward passes are shared, and neighbours don't matter."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import httpx
import numpy as np
from PIL import Image


def body(seed: int, steps: int, guidance: float) -> dict[str, Any]:
    prompt = f"a {('red', 'green', 'blue')[seed % 3]} circle on a white background"
    return {
        "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [prompt]}],
        "parameters": {"seed": seed, "num_inference_steps": steps, "guidance_scale": guidance},
    }


def pixels(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["outputs"][0]["data"][0])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


async def paint_all(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> list[np.ndarray]:
    answers = await asyncio.gather(*(client.post("/v2/models/sdxl/infer", json=each) for each in bodies))
    return [pixels(answer) for answer in answers]


async def test_sixteen_requests_at_once_give_the_pictures_that_each_gives_alone(server: Any) -> None:
    bodies = [body(seed, 2 + seed % 5, (1.0, 3.0, 7.5)[seed % 3]) for seed in range(16)]
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        alone = [await paint_all(client, [each]) for each in bodies]
        before = await counters(client)
        together = await paint_all(client, bodies)
        after = await counters(client)
    for (one,), other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 2
    passes = after["sdxl_images_per_forward_pass_count"] - before["sdxl_images_per_forward_pass_count"]
    rows = after["sdxl_images_per_forward_pass_sum"] - before["sdxl_images_per_forward_pass_sum"]
    assert rows == sum(each["parameters"]["num_inference_steps"] for each in bodies)
    assert passes < rows / 2
    assert after["sdxl_pending_images"] == after["sdxl_running_images"] == 0


async def counters(client: httpx.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("sdxl_")}
