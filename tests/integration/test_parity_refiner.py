"""Base and refiner in one job give what the two stock pipelines give one after the other: every pixel."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from app.engine.scheduler_names import NAMES
from app.engine.sdxl import SdxlFamily
from app.generation import GenerateRequest
from tests.integration.stock import check_idle, mask, ours, picture, theirs

PROMPT = "a blue star on a white background"
REFINED = ("aesthetic_score", "negative_aesthetic_score")


def in_a_row(
    base: Any, refiner: Any, seed: int, limit: float, scheduler: str | None = None, **parameters: Any
) -> np.ndarray:
    """As diffusers' documentation of the ensemble of experts has it, with one generator for both."""
    own = base.scheduler, refiner.scheduler
    if scheduler is not None:
        class_name, overrides = NAMES[scheduler]
        for pipeline in (base, refiner):
            pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **overrides)
    generator = torch.Generator().manual_seed(seed)
    first = {name: value for name, value in parameters.items() if name not in REFINED}
    second = {name: value for name, value in parameters.items() if name not in ("height", "width", "image", "strength")}
    if "image" not in parameters:
        second.pop("prompt_2", None)
    try:
        latents = theirs(base, generator, denoising_end=limit, output_type="latent", **first)
        if "mask_image" in parameters:
            second |= {"height": first.get("height", 128), "width": first.get("width", 128)}
        return theirs(refiner, generator, denoising_start=limit, image=latents, **second)
    finally:
        base.scheduler, refiner.scheduler = own


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"guidance_scale": 1.0}, id="no-guidance"),
        pytest.param({"negative_prompt": "blue", "guidance_rescale": 0.7}, id="negative_prompt"),
        pytest.param({"aesthetic_score": 3.0, "negative_aesthetic_score": 7.0}, id="scores"),
        pytest.param({"height": 96, "width": 160}, id="landscape"),
        pytest.param({"original_size": (64, 32), "crops_coords_top_left": (256, 0)}, id="sizes"),
    ],
)
def test_base_and_refiner_equal_the_stock_pipelines_in_a_row(
    refined: SdxlFamily,
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    limit: float,
    parameters: dict[str, Any],
) -> None:
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 8, **parameters}
    painted = ours(refined, seed=4, denoising_limit=limit, **common)
    assert np.array_equal(painted, in_a_row(stock, stock_refiner, 4, limit, **common))


@pytest.mark.parametrize("steps", [1, 2])
def test_so_few_steps_that_hardly_any_is_the_bases_equal_the_stock_pipelines_too(
    refined: SdxlFamily,
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    steps: int,
) -> None:
    """Of a single step, none is: the first timestep of the demo's schedule lies in the refiner's part."""
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": steps}
    painted = ours(refined, seed=4, denoising_limit=0.8, **common)
    assert np.array_equal(painted, in_a_row(stock, stock_refiner, 4, 0.8, **common))


@pytest.mark.parametrize("scheduler", ["Euler a", "DPM++ 2M Karras", "Heun", "DDIM", "UniPC", "DPM2", "LMS", "DEIS"])
def test_every_kind_of_scheduler_is_handed_over_as_in_the_stock_pipelines(
    refined: SdxlFamily,
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    scheduler: str,
) -> None:
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 8, "scheduler": scheduler}
    painted = ours(refined, seed=4, denoising_limit=0.6, **common)
    assert np.array_equal(painted, in_a_row(stock, stock_refiner, 4, 0.6, **common))


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_image_to_image_is_refined_as_by_the_stock_pipelines(
    refined: SdxlFamily,
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    strength: float,
) -> None:
    base = StableDiffusionXLImg2ImgPipeline(**stock.components)
    base.set_progress_bar_config(disable=True)
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "image": picture(), "strength": strength}
    painted = ours(refined, seed=4, denoising_limit=0.8, **common)
    assert np.array_equal(painted, in_a_row(base, stock_refiner, 4, 0.8, **common))


def test_an_image_that_is_changed_less_than_the_refiners_part_is_the_refiners_alone(
    refined: SdxlFamily, stock_refiner: StableDiffusionXLImg2ImgPipeline
) -> None:
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "image": picture(), "strength": 0.15}
    assert np.array_equal(ours(refined, seed=4, denoising_limit=0.6, **common), theirs(stock_refiner, 4, **common))


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting_is_refined_as_by_the_stock_pipelines(
    refined: SdxlFamily,
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    strength: float,
) -> None:
    base = StableDiffusionXLInpaintPipeline(**stock.components)
    refiner = StableDiffusionXLInpaintPipeline(**stock_refiner.components, requires_aesthetics_score=True)
    refiner.register_to_config(force_zeros_for_empty_prompt=False)
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 8, "image": picture(), "mask_image": mask()}
    painted = ours(refined, seed=4, denoising_limit=0.6, strength=strength, **common)
    assert np.array_equal(painted, in_a_row(base, refiner, 4, 0.6, strength=strength, **common))


def test_without_a_limit_the_refiner_takes_over_at_its_authors_value(refined: SdxlFamily) -> None:
    request = refined.resolve(GenerateRequest(prompt=PROMPT))
    assert (request.denoising_limit, request.aesthetic_score, request.negative_aesthetic_score) == (0.8, 6.0, 2.5)
    assert refined.resolve(GenerateRequest(prompt=PROMPT, denoising_end=0.5)).denoising_limit == 1.0


@pytest.mark.parametrize(
    "parameters",
    [{"denoising_limit": 1.0}, {"denoising_limit": 0.999}, {"denoising_limit": 0.8, "denoising_end": 0.7}],
    ids=["left-out", "no-step-left", "ends-before"],
)
def test_where_nothing_is_left_for_the_refiner_the_base_paints_alone(
    refined: SdxlFamily, stock: StableDiffusionXLPipeline, parameters: dict[str, float]
) -> None:
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4}
    end = {"denoising_end": parameters["denoising_end"]} if "denoising_end" in parameters else {}
    assert np.array_equal(ours(refined, seed=2, **common, **parameters), theirs(stock, 2, **common, **end))


def test_the_parts_share_what_is_the_same(refined: SdxlFamily) -> None:
    assert refined._refiner is not None
    assert refined._refiner.vae is refined._base.vae


def test_a_job_moves_from_one_signature_to_the_other(refined: SdxlFamily) -> None:
    request = refined.resolve(GenerateRequest(prompt=PROMPT, seed=1, num_inference_steps=10, denoising_limit=0.8))
    job = refined.begin(request, refined.encode(request))
    parts = []
    while not job.done:
        parts.append(job.leg.part.name)
        refined.step([job])
    assert parts == ["base"] * 8 + ["refiner"] * 2
    assert job.num_steps == job.step_index == 10


def test_without_a_refiner_its_parameters_have_no_effect_and_that_is_said(family: SdxlFamily) -> None:
    request = family.resolve(GenerateRequest(prompt=PROMPT, denoising_limit=0.8, aesthetic_score=5.0))
    (sentence,) = family.warnings(request)
    assert sentence == "denoising_limit and aesthetic_score have no effect without a refiner."


@pytest.mark.parametrize(
    ("common", "idle", "message"),
    [
        (
            {"denoising_limit": 1.0},
            {"aesthetic_score": 9.0},
            "aesthetic_score has no effect where the refiner has no st",
        ),
        (
            {"denoising_end": 0.5},
            {"aesthetic_score": 9.0},
            "aesthetic_score has no effect where the refiner has no step",
        ),
        (
            {"denoising_end": 0.3},
            {"denoising_limit": 0.5},
            "denoising_limit has no effect where denoising_end is not be",
        ),
        (
            {"guidance_scale": 1.0},
            {"negative_aesthetic_score": 9.0},
            "negative_aesthetic_score has no effect without gui",
        ),
        ({}, {"negative_target_size": (8, 8)}, "negative_target_size has no effect without negative_original_size"),
    ],
)
def test_what_is_the_refiners_and_has_no_effect_is_said(
    refined: SdxlFamily, common: dict[str, Any], idle: dict[str, Any], message: str
) -> None:
    check_idle(refined, {"prompt": PROMPT, "seed": 4, "num_inference_steps": 5, **common}, idle, message)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0},
        {"denoising_limit": 1.0},
        {"denoising_end": 0.5},
        {"denoising_limit": 0.5, "denoising_end": 0.9},
        {"guidance_scale": 1.0, "aesthetic_score": 9.0},
    ],
)
def test_what_the_refiner_heeds_is_not_warned_of(refined: SdxlFamily, parameters: dict[str, Any]) -> None:
    assert refined.warnings(refined.resolve(GenerateRequest(prompt=PROMPT, **parameters))) == ()


def test_the_model_names_what_it_takes(family: SdxlFamily) -> None:
    assert "true_cfg_scale" not in family.parameters and "loras" not in family.parameters
    assert {"image", "mask_image", "denoising_limit", "aesthetic_score"} <= family.parameters


def test_steps_so_few_that_none_is_left_for_the_base_are_the_refiners(refined: SdxlFamily) -> None:
    """As in the first generation of every server, which has one step."""
    request = refined.resolve(GenerateRequest(prompt=PROMPT, num_inference_steps=1, seed=4, denoising_limit=0.8))
    job = refined.begin(request, refined.encode(request))
    assert ([leg.part.name for leg in job.legs], job.num_steps) == (["refiner"], 1)
    refined.step([job])
    assert job.done
    assert refined.decode([job]).shape == (1, 128, 128, 3)
