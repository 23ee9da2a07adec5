"""Image to image and inpainting, with and without a refiner, give what the stock pipelines give: every pixel."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from app.demo.shapes import Drawing, draw
from app.engine.scheduler_names import NAMES
from app.engine.sdxl import SdxlFamily
from app.errors import InvalidRequest
from app.generation import GenerateRequest, Pixels
from tests.integration.stock import mask, ours, picture, theirs
from tests.small_models import load_demo

PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def img2img(stock: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    pipeline = StableDiffusionXLImg2ImgPipeline(**stock.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def inpaint(stock: StableDiffusionXLPipeline) -> StableDiffusionXLInpaintPipeline:
    pipeline = StableDiffusionXLInpaintPipeline(**stock.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_autoencoder_whose_latents_have_a_mean_and_a_deviation_equals_the_stock_call() -> None:
    pipeline = load_demo()
    channels = pipeline.vae.config.latent_channels
    pipeline.vae.register_to_config(latents_mean=[0.1] * channels, latents_std=[1.3] * (channels - 1) + [0.8])
    family = SdxlFamily(pipeline)
    img2img = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    for stock, more in ((pipeline, {}), (img2img, {"image": picture(), "strength": 0.6})):
        stock.set_progress_bar_config(disable=True)
        common = {"prompt": PROMPT, "num_inference_steps": 4, **more}
        found = ours(family, seed=3, **common)
        assert np.array_equal(found, theirs(stock, 3, **common))
        assert not np.array_equal(found, ours(SdxlFamily(load_demo()), seed=3, **common))


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"strength": 0.6}, id="strength"),
        pytest.param({"strength": 1.0}, id="full-strength"),
        pytest.param({"strength": 0.11, "num_inference_steps": 10}, id="one-step"),
        pytest.param({"guidance_scale": 1.0, "strength": 0.5}, id="no-guidance"),
        pytest.param({"negative_prompt": "blue", "guidance_rescale": 0.5}, id="negative_prompt"),
        pytest.param({"denoising_end": 0.9, "strength": 0.8}, id="denoising_end"),
        pytest.param({"original_size": (64, 64), "crops_coords_top_left": (3, 4)}, id="sizes"),
        pytest.param({"negative_original_size": (64, 64)}, id="negative-size"),
        pytest.param({"negative_target_size": (32, 64), "target_size": (99, 98)}, id="negative-target"),
    ],
)
def test_image_to_image_equals_the_stock_call(
    family: SdxlFamily, img2img: StableDiffusionXLImg2ImgPipeline, parameters: dict[str, Any], seed: int
) -> None:
    common = {"prompt": PROMPT, "num_inference_steps": 6, "image": picture(), **parameters}
    assert np.array_equal(ours(family, seed=seed, **common), theirs(img2img, seed, **common))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_scheduler_changes_an_image_as_in_the_stock_call_or_says_why_not(
    family: SdxlFamily, img2img: StableDiffusionXLImg2ImgPipeline, name: str
) -> None:
    import diffusers

    class_name, overrides = NAMES[name]
    own = img2img.scheduler
    seeded = {"noise_sampler_seed": 5} if class_name == "DPMSolverSDEScheduler" else {}
    img2img.scheduler = getattr(diffusers, class_name).from_config(own.config, **overrides, **seeded)
    common = {"prompt": PROMPT, "num_inference_steps": 6, "strength": 0.7, "image": picture()}
    try:
        expected = theirs(img2img, 5, **common)
    finally:
        img2img.scheduler = own
    assert np.array_equal(ours(family, seed=5, scheduler=name, **common), expected)


@pytest.mark.parametrize("scheduler", [None, "Euler a", "DDIM"])
@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"strength": 0.6}, id="strength"),
        pytest.param({"strength": 1.0}, id="full-strength"),
        pytest.param({"guidance_scale": 1.0}, id="no-guidance"),
        pytest.param({"denoising_end": 0.7}, id="denoising_end"),
        pytest.param({"height": 96, "width": 160}, id="resized"),
    ],
)
def test_inpainting_equals_the_stock_call(
    family: SdxlFamily,
    inpaint: StableDiffusionXLInpaintPipeline,
    parameters: dict[str, Any],
    scheduler: str | None,
) -> None:
    import diffusers

    own = inpaint.scheduler
    if scheduler is not None:
        inpaint.scheduler = getattr(diffusers, NAMES[scheduler][0]).from_config(own.config)
    common = {"prompt": PROMPT, "num_inference_steps": 5, "image": picture(), "mask_image": mask(), **parameters}
    try:
        expected = theirs(inpaint, 7, **common)
    finally:
        inpaint.scheduler = own
    assert np.array_equal(ours(family, seed=7, scheduler=scheduler, **common), expected)


def test_what_the_mask_does_not_cover_stays(family: SdxlFamily) -> None:
    image = draw(Drawing("green", "square", "yellow", "large"), 128, 128, random.Random(0))
    painted = ours(family, prompt=PROMPT, seed=1, num_inference_steps=8, image=image, mask_image=mask(), strength=1.0)
    before = np.asarray(image).astype(int)
    corners = [slice(0, 16), slice(112, 128)]
    for rows in corners:
        for columns in corners:
            assert np.abs(painted[rows, columns].astype(int) - before[rows, columns]).mean() < 25
    assert np.abs(painted[56:72, 56:72].astype(int) - before[56:72, 56:72]).mean() > 40


def test_an_images_own_size_is_the_default_and_one_that_does_not_fit_is_refused(family: SdxlFamily) -> None:
    image = Pixels(bytes(96 * 160 * 3), 96, 160)
    request = family.resolve(GenerateRequest(prompt=PROMPT, image=image))
    assert (request.height, request.width, request.strength, request.guidance_scale) == (96, 160, 0.3, 5.0)
    odd = Pixels(bytes(100 * 77 * 3), 100, 77)
    with pytest.raises(InvalidRequest, match=r"100 pixels high and 77 wide.*multiples of 8.*such as 96 and 80"):
        family.resolve(GenerateRequest(prompt=PROMPT, image=odd))
    request = family.resolve(GenerateRequest(prompt=PROMPT, image=odd, height=96, width=80))
    assert (request.height, request.width) == (96, 80)


def test_a_strength_that_leaves_no_step_is_refused_with_one_that_does(family: SdxlFamily) -> None:
    with pytest.raises(InvalidRequest, match=r"strength 0\.1 of 5 steps leaves no step.*at least 0\.2"):
        family.resolve(
            GenerateRequest(prompt=PROMPT, image=Pixels(bytes(192), 8, 8), strength=0.1, num_inference_steps=5)
        )


@pytest.mark.parametrize("masked", [False, True])
def test_an_end_before_the_first_step_shows_the_image_under_the_noise_it_would_begin_with(
    family: SdxlFamily, masked: bool
) -> None:
    common = {"prompt": PROMPT, "image": picture(), "mask_image": mask() if masked else None, "strength": 0.5}
    nothing = ours(family, seed=2, denoising_end=1e-9, **common)
    something = ours(family, seed=2, **common)
    assert nothing.shape == something.shape and not np.array_equal(nothing, something)


def test_a_preview_shows_the_colours_of_the_picture(family: SdxlFamily) -> None:
    request = family.resolve(GenerateRequest(prompt=PROMPT, seed=3, num_inference_steps=8))
    job = family.begin(request, family.encode(request))
    while not job.done:
        family.step([job])
        assert family.preview(job).shape == (128, 128, 3)
    assert np.array_equal(family.preview(job), family.decode([job])[0])


def test_nine_channels_inpaint_as_the_stock_call_does_and_do_nothing_else(stock: StableDiffusionXLPipeline) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**stock.unet.config, "in_channels": 9})
    components = {**stock.components, "unet": unet.eval()}
    pipeline = StableDiffusionXLInpaintPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    family = SdxlFamily(StableDiffusionXLPipeline(**components))
    common: dict[str, Any] = {
        "prompt": PROMPT,
        "num_inference_steps": 4,
        "image": picture(),
        "mask_image": mask(),
    }
    for strength in (0.9999, 1.0, 0.5):
        common["strength"] = strength
        assert np.array_equal(ours(family, seed=2, **common), theirs(pipeline, 2, **common)), strength
    with pytest.raises(InvalidRequest, match="only inpaints"):
        family.resolve(GenerateRequest(prompt=PROMPT))
