"""The demo FLUX as a server of its own: ``--model_type flux --model_id demo``."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from app.demo.shapes import Drawing, judge


@pytest.fixture(scope="module")
def flux(start_server: Callable[..., Any]) -> Any:
    return start_server("--model-type", "flux", "--model_name", "flux")


def paint(server: Any, prompt: str, **parameters: Any) -> httpx.Response:
    inputs = [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [prompt]}]
    return httpx.post(
        f"{server.url}/v2/models/flux/infer", json={"inputs": inputs, "parameters": parameters}, timeout=300
    )


def test_it_paints_what_it_is_told_over_http(flux: Any) -> None:
    drawings = [
        Drawing("red", "circle", "white"),
        Drawing("blue", "square", "yellow"),
        Drawing("green", "star", "black"),
    ]
    right = 0
    for seed, drawing in enumerate(drawings):
        answer = paint(flux, drawing.caption, seed=seed, num_inference_steps=8)
        assert answer.status_code == 200, answer.text
        picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["outputs"][0]["data"][0])))
        verdict = judge(picture.convert("RGB"))
        right += (verdict.colour, verdict.background) == (drawing.colour, drawing.background)
    assert right >= 2


def test_what_is_sdxls_alone_is_refused(flux: Any) -> None:
    answer = paint(flux, "a red circle", guidance_rescale=0.5)
    assert answer.status_code == 400
    assert "guidance_rescale" in answer.json()["error"]


def test_a_client_of_the_old_runtime_is_answered_as_ever(flux: Any) -> None:
    old = {
        "prompt": "a red circle on a white background",
        "guidance_scale": 8.0,
        "num_inference_steps": 8,
        "crops_coords_top_left": [256, 0],
        "width": 128,
        "height": 128,
        "denoising_limit": 0.8,
    }
    answer = httpx.post(f"{flux.url}/v1/models/flux:predict", json={"instances": [old, old]}, timeout=300)
    assert answer.status_code == 200, answer.text
    for prediction in answer.json()["predictions"]:
        assert list(prediction) == ["model_name", "prompt", "image"]
        picture = Image.open(io.BytesIO(base64.b64decode(prediction["image"]["b64"])))
        assert picture.size == (128, 128)
    assert "denoising_limit, crops_coords_top_left have no effect on FLUX" in flux.log()
