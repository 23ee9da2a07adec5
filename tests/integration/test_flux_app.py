"""FLUX behind HTTP: what its metadata lists, what it answers, and what it refuses."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.engine.flux import FluxFamily
from app.engine.optimization import Optimization
from tests.integration.stock import mask, ours, picture, png
from tests.integration.test_app import INFER, running
from tests.tiny_flux import make_flux

COMMON = {"num_inference_steps": 2, "seed": 5, "max_sequence_length": 64}
PROMPT = "a red star"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with running(lambda: FluxFamily(make_flux())) as client:
        yield client


def text(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}


def body(*inputs: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {"inputs": [text("prompt", PROMPT), *inputs], "parameters": {**COMMON, **parameters}}


def shown(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["outputs"][0]["data"][0]))))


async def test_a_prompt_is_painted_at_the_models_own_size_with_its_own_defaults(client: httpx.AsyncClient) -> None:
    answer = await client.post(INFER, json=body())
    assert np.array_equal(shown(answer), ours(FluxFamily(make_flux()), prompt=PROMPT, **COMMON))
    parameters = answer.json()["parameters"]
    assert (parameters["height"], parameters["width"]) == (64, 64)
    assert (parameters["guidance_scale"], parameters["true_cfg_scale"]) == (3.5, 1.0)
    assert parameters["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert "warnings" not in parameters


async def test_a_picture_is_painted_over_where_the_mask_says(client: httpx.AsyncClient) -> None:
    images = {"image": picture(64, 64), "mask_image": mask(64, 64)}
    inputs = [text(name, base64.b64encode(png(image)).decode()) for name, image in images.items()]
    answer = await client.post(INFER, json=body(*inputs, strength=0.9))
    expected = ours(FluxFamily(make_flux()), prompt=PROMPT, strength=0.9, **images, **COMMON)
    assert np.array_equal(shown(answer), expected)
    assert answer.json()["parameters"]["guidance_scale"] == 7.0


async def test_metadata_lists_what_flux_takes_and_nothing_else(client: httpx.AsyncClient) -> None:
    inputs = {each["name"] for each in (await client.get("/v2/models/m")).json()["inputs"]}
    assert {"prompt", "true_cfg_scale", "max_sequence_length", "image", "mask_image", "denoising_limit"} <= inputs
    assert not {"guidance_rescale", "guidance_end", "clip_skip", "aesthetic_score", "loras"} & inputs


async def test_a_server_that_may_trade_pictures_for_speed_ends_guidance_and_says_so() -> None:
    async with running(lambda: FluxFamily(make_flux(), optimization=Optimization("max", backend="eager"))) as client:
        assert "guidance_end" in {each["name"] for each in (await client.get("/v2/models/m")).json()["inputs"]}
        guided = {"true_cfg_scale": 2.0, "negative_prompt": "blue"}
        for asked, lossy in (({**guided, "guidance_end": 0.5}, "guidance_end"), (guided, None)):
            parameters = (await client.post(INFER, json=body(**asked))).json()["parameters"]
            assert parameters.get("lossy") == lossy


async def test_every_example_of_the_document_is_painted(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    painted = 0
    for path in ("/v2/models/{model_name}/infer", "/v1/models/{model_name}:predict"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name, example in content["examples"].items():
            answer = await client.post(path.format(model_name="m"), json=example["value"])
            assert answer.status_code == 200, (name, answer.text)
            painted += 1
    assert painted > 5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"guidance_rescale": 0.5}, "guidance_rescale"),
        ({"height": 72}, "height must be a multiple of 16, not 72; the nearest fitting: 64 and 80."),
        ({"scheduler": "DDIM"}, "There is no scheduler 'DDIM' for FLUX; there are Euler, Heun."),
        ({"prompt_2": "x" * 99}, "prompt_2 has 101 tokens, 37 more than max_sequence_length (64)"),
    ],
)
async def test_what_flux_cannot_do_is_refused(
    client: httpx.AsyncClient, parameters: dict[str, Any], message: str
) -> None:
    answer = await client.post(INFER, json=body(**parameters))
    assert answer.status_code == 400
    assert message in answer.json()["error"]


async def test_what_clients_of_sdxl_send_is_served_with_a_warning(client: httpx.AsyncClient) -> None:
    sizes = [
        {"name": name, "shape": [1, 2], "datatype": "INT32", "data": [64, 64]}
        for name in ("original_size", "target_size")
    ]
    answer = await client.post(INFER, json=body(*sizes, high_noise_frac=0.8))
    assert (
        "denoising_limit, original_size, target_size have no effect on FLUX" in answer.json()["parameters"]["warnings"]
    )


async def test_protocol_v1_paints_with_flux_too(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/models/m:predict", json={"instances": [{"prompt": PROMPT, **COMMON}]})
    assert answer.status_code == 200, answer.text
    image = base64.b64decode(answer.json()["predictions"][0]["image"]["b64"])
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(image))), ours(FluxFamily(make_flux()), prompt=PROMPT, **COMMON)
    )
