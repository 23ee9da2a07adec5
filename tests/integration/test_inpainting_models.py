"""Models that only inpaint, from their folder to their answer, and what the server paints with them for itself."""

from __future__ import annotations

import base64
import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

from app.engine.optimization import Optimization
from app.engine.sdxl import SdxlFamily
from app.engine.weights import load_family
from app.generation import GenerateRequest, Pixels
from app.settings import Settings
from tests.integration.stock import mask, ours, picture, png, theirs
from tests.integration.test_app import INFER, running
from tests.integration.test_flux_app import shown, text
from tests.small_models import make_inpainting

PROMPT = "a red star"
COMMON: dict[str, Any] = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def inpainting(stock: StableDiffusionXLPipeline) -> StableDiffusionXLInpaintPipeline:
    # Others compare with the stock pipeline in every pixel, and a test here lays out its weights anew.
    pipeline = make_inpainting(copy.deepcopy(stock))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(inpainting: StableDiffusionXLInpaintPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inpainting")
    inpainting.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["requires_aesthetics_score"] is False, "an entry that the pipeline for text to image does not take"
    return folder


@pytest.mark.parametrize("refiner", [{}, {"use_refiner": True, "refiner_id": "demo"}], ids=["alone", "refined"])
async def test_the_folder_of_an_inpainting_model_is_served(
    inpainting: StableDiffusionXLInpaintPipeline,
    folder: Path,
    refiner: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = {"image": picture(), "mask_image": mask()}
    inputs = [text(name, base64.b64encode(png(image)).decode()) for name, image in images.items()]
    async with running(None, model_id=str(folder), warm_up=True, **refiner) as client:
        asked = {"inputs": [text("prompt", PROMPT), *inputs], "parameters": {**COMMON, "seed": 2}}
        found = shown(await client.post(INFER, json=asked))
        refused = await client.post(INFER, json={**asked, "inputs": [text("prompt", PROMPT)]})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (refused.status_code, "only inpaints" in refused.text) == (400, True)
    expected = theirs(inpainting, 2, prompt=PROMPT, **images, **COMMON)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected) is not bool(refiner)


def test_what_the_server_paints_for_itself_has_an_image_and_a_mask_in_its_size(folder: Path) -> None:
    family = load_family(Settings(model_id=str(folder)))
    assert isinstance(family, SdxlFamily)
    smallest = GenerateRequest(prompt="", seed=0, num_inference_steps=2)
    for asked, (width, height) in ((smallest, (128, 128)), (replace(smallest, width=64, height=96), (64, 96))):
        request = family.rehearsal(asked)
        for pixels in (request.image, request.mask_image):
            assert isinstance(pixels, Pixels)
            assert (pixels.width, pixels.height) == (width, height)
            assert len(pixels.data) == width * height * pixels.channels
        resolved = family.resolve(request)
        assert (resolved.width, resolved.height) == (width, height)
        assert family.begin(resolved, family.encode(resolved)).num_steps == 2


def test_a_model_that_paints_from_text_rehearses_just_that(family: SdxlFamily) -> None:
    request = family.rehearsal(GenerateRequest(prompt="", seed=0))
    assert request == GenerateRequest(prompt="", seed=0, width=128, height=128)


@pytest.mark.usefixtures("untraced")
def test_an_inpainting_model_is_warmed_for_pictures_with_masks(inpainting: StableDiffusionXLInpaintPipeline) -> None:
    optimization = Optimization("compile", ((64, 64),), most_rows=2, backend="eager")
    family = SdxlFamily(StableDiffusionXLPipeline(**inpainting.components), optimization=optimization)
    family.warm(lambda _: None)
    size = {"width": 64, "height": 64}
    ours(family, prompt=PROMPT, seed=2, image=picture(), mask_image=mask(), **size, **COMMON)
    assert family.unexpected_shapes == 0
