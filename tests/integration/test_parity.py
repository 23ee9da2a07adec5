"""Alone, a request gives the picture that the stock pipeline's ``__call__`` gives: on the CPU, every pixel."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from app.engine.scheduler_names import NAMES
from app.engine.sdxl import SdxlFamily
from app.errors import GenerationFailed, InvalidRequest, OutOfMemory
from app.generation import GenerateRequest
from tests.integration.stock import check_idle, mask, ours, picture, resolved, theirs

PROMPT = "a small red star on a white background"


@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "guidance"),
    [
        ("a red circle on a white background", 0, 4, 5.0),
        ("a large blue square on a yellow background", 1, 1, 7.5),
        ("a small green triangle on a black background", 2, 2, 5.3),
        ("a purple star on a orange background", 3, 5, 1.0),
        ("a white ring on a red background", 4, 3, 0.0),
        ("a black cross on a purple background", 2**40 + 5, 7, 3.0),
        ("", 6, 3, 5.0),
        ("words that it never saw: zebra, 日本, émoji 🎨", 7, 3, 5.0),
        ("a yellow circle on a blue background", 2**63 - 1, 10, 12.0),
        ("(parentheses) and [brackets] that (weigh nothing", 9, 2, 5.0),
        ("red " * 75, 9, 2, 5.0),
    ],
)
def test_a_solo_request_equals_the_stock_call_in_every_pixel(
    family: SdxlFamily, stock: StableDiffusionXLPipeline, prompt: str, seed: int, steps: int, guidance: float
) -> None:
    common = {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance}
    assert np.array_equal(ours(family, seed=seed, **common), theirs(stock, seed, **common))


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"negative_prompt": "blue"}, id="negative_prompt"),
        pytest.param({"negative_prompt": ""}, id="empty-negative_prompt"),
        pytest.param({"negative_prompt": "blue", "negative_prompt_2": "circle"}, id="negative_prompt_2"),
        pytest.param({"negative_prompt_2": "circle"}, id="negative_prompt_2-alone"),
        pytest.param({"prompt_2": "a green ring on a black background"}, id="prompt_2"),
        pytest.param({"guidance_rescale": 0.7}, id="guidance_rescale"),
        pytest.param({"guidance_rescale": 0.7, "guidance_scale": 1.0}, id="rescale-without-guidance"),
        pytest.param({"clip_skip": 0}, id="clip_skip-0"),
        pytest.param({"clip_skip": 1}, id="clip_skip-1"),
        pytest.param({"clip_skip": 2, "negative_prompt": "blue"}, id="clip_skip-2"),
        pytest.param({"original_size": (512, 256)}, id="original_size"),
        pytest.param({"crops_coords_top_left": (256, 0)}, id="crops_coords_top_left"),
        pytest.param({"target_size": (1024, 1024)}, id="target_size"),
        pytest.param({"denoising_end": 0.5, "num_inference_steps": 6}, id="denoising_end"),
        pytest.param({"denoising_end": 0.01}, id="denoising_end-before-the-first-step"),
        pytest.param({"denoising_end": 1.0}, id="denoising_end-at-the-end"),
        pytest.param({"height": 96, "width": 160}, id="landscape"),
        pytest.param({"height": 104, "width": 72}, id="odd-latents"),
        pytest.param({"height": 8, "width": 8}, id="smallest"),
        pytest.param({"negative_original_size": (64, 64), "negative_target_size": (32, 32)}, id="negative-sizes"),
        pytest.param({"negative_original_size": (64, 64)}, id="negative-size-alone"),
        pytest.param({"timesteps": [999, 500, 100]}, id="timesteps"),
        pytest.param({"sigmas": [10.0, 3.0, 0.5]}, id="sigmas"),
    ],
)
def test_every_parameter_means_what_it_means_to_the_stock_call(
    family: SdxlFamily, stock: StableDiffusionXLPipeline, parameters: dict[str, Any]
) -> None:
    common = {"prompt": PROMPT, "num_inference_steps": 3, **parameters}
    assert np.array_equal(ours(family, seed=11, **common), theirs(stock, 11, **common))


def test_defaults_are_the_pipelines_own(family: SdxlFamily) -> None:
    request = family.resolve(GenerateRequest(prompt=PROMPT))
    assert (request.height, request.width, request.num_inference_steps, request.guidance_scale) == (128, 128, 50, 5.0)
    assert (request.original_size, request.crops_coords_top_left, request.target_size) == (
        (128, 128),
        (0, 0),
        (128, 128),
    )
    assert request.scheduler == "EulerDiscreteScheduler"


@pytest.mark.parametrize("own", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_model_of_karras_noise_takes_only_the_schedulers_that_know_it(
    stock: StableDiffusionXLPipeline, own: str
) -> None:
    """Playground 2.5: its configuration says nothing of betas, from which all others would count."""
    pipeline = StableDiffusionXLPipeline(**{**stock.components, "scheduler": getattr(diffusers, own)()})
    pipeline.set_progress_bar_config(disable=True)
    family = SdxlFamily(pipeline)
    assert family.schedulers == ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), "what callers are offered"
    for name in family.schedulers:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        painted = ours(family, prompt=PROMPT, seed=5, num_inference_steps=4, scheduler=name)
        assert np.array_equal(painted, theirs(pipeline, 5, prompt=PROMPT, num_inference_steps=4))
    for name in NAMES:
        with pytest.raises(InvalidRequest, match="does not go with this model"):
            family.resolve(GenerateRequest(prompt=PROMPT, scheduler=name))
    with pytest.raises(InvalidRequest, match=r"; there are EDMEulerScheduler, EDMDPMSolverMultistepScheduler\.$"):
        family.resolve(GenerateRequest(prompt=PROMPT, scheduler="zzz"))


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_equals_the_stock_call_with_that_scheduler(
    family: SdxlFamily, stock: StableDiffusionXLPipeline, name: str
) -> None:
    class_name, overrides = NAMES[name]
    own = stock.scheduler
    seeded = {"noise_sampler_seed": 5} if class_name == "DPMSolverSDEScheduler" else {}
    stock.scheduler = getattr(diffusers, class_name).from_config(own.config, **overrides, **seeded)
    try:
        expected = theirs(stock, 5, prompt=PROMPT, num_inference_steps=6)
    finally:
        stock.scheduler = own
    picture = ours(family, prompt=PROMPT, seed=5, num_inference_steps=6, scheduler=name)
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", None])
@pytest.mark.parametrize("name", ["Euler", "DPM++ 2M", "Heun", "UniPC", "DPM++ SDE", "LMS", "DEIS"])
def test_noise_levels_and_spacings_are_those_of_the_stock_scheduler(
    family: SdxlFamily, stock: StableDiffusionXLPipeline, name: str, flag: str | None, spacing: str
) -> None:
    class_name, overrides = NAMES[name]
    own = stock.scheduler
    options = {"timestep_spacing": spacing, **({flag: True} if flag else {})}
    seeded = {"noise_sampler_seed": 5} if class_name == "DPMSolverSDEScheduler" else {}
    stock.scheduler = getattr(diffusers, class_name).from_config(own.config, **overrides, **options, **seeded)
    try:
        expected = theirs(stock, 5, prompt=PROMPT, num_inference_steps=3)
    finally:
        stock.scheduler = own
    picture = ours(family, prompt=PROMPT, seed=5, num_inference_steps=3, scheduler=name, **options)
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scheduler": "DDIM", "use_karras_sigmas": True}, "DDIM has no use_karras_sigmas"),
        ({"scheduler": "DDIM", "sigmas": (3.0, 1.0)}, "DDIM takes no sigmas of one's own"),
        ({"scheduler": "UniPC", "timesteps": (3.0, 1.0)}, "UniPC takes no timesteps of one's own"),
        ({"scheduler": "UniPC", "sigmas": (3.0, 0.0)}, "UniPC takes no sigmas of one's own"),
        ({"scheduler": "Euler Karras", "timesteps": (900.0, 1.0)}, "timesteps and the scheduler Euler Karras"),
        ({"scheduler": "Euler Karras", "sigmas": (3.0, 0.0)}, "Euler Karras, which spaces its own, contradict"),
        ({"sigmas": (3.0,)}, "sigmas must have at least 2 numbers"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused_by_its_name(
    family: SdxlFamily, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        family.resolve(GenerateRequest(prompt=PROMPT, **parameters))


@pytest.mark.parametrize(
    ("parameters", "steps"),
    [
        ({}, 6),
        ({"scheduler": "Heun"}, 11),
        ({"scheduler": "DPM2 a"}, 11),
        ({"scheduler": "PNDM"}, 15),
        ({"denoising_end": 0.5}, 2),
        ({"denoising_end": 0.01}, 0),
        ({"timesteps": (900.0, 500.0, 100.0)}, 3),
        ({"sigmas": (14.0, 3.0, 1.0, 0.0)}, 3),
        ({"image": picture(), "strength": 0.5}, 3),
        ({"image": picture(), "strength": 0.5, "scheduler": "Heun"}, 5),
        ({"image": picture(), "mask_image": picture().convert("L"), "strength": 0.34}, 2),
        ({"image": picture(), "sigmas": (14.0, 3.0, 1.0, 0.0), "strength": 0.7}, 2),
        ({"image": picture(), "timesteps": (900.0, 600.0, 300.0, 100.0), "strength": 0.5}, 2),
        ({"image": picture(), "timesteps": (900.0, 600.0, 300.0, 100.0), "strength": 0.5, "scheduler": "Heun"}, 3),
        ({"image": picture(), "timesteps": (900.0, 600.0, 300.0, 100.0), "strength": 0.3, "scheduler": "Heun"}, 1),
    ],
)
def test_how_many_steps_there_will_be_is_known_before_they_begin(
    family: SdxlFamily, parameters: dict[str, Any], steps: int
) -> None:
    if not {"timesteps", "sigmas"} & set(parameters):
        parameters = {"num_inference_steps": 6, **parameters}
    request = resolved(family, prompt=PROMPT, seed=1, **parameters)
    assert family.steps(request) == steps
    job = family.begin(request, family.encode(request))
    assert job.num_steps == steps
    while not job.done:
        family.step([job])


def test_sigmas_of_ones_own_are_counted_as_the_steps_between_them(family: SdxlFamily) -> None:
    assert family.resolve(GenerateRequest(prompt=PROMPT, sigmas=(14.0, 3.0, 0.0))).num_inference_steps == 2


def test_eta_is_ddims(family: SdxlFamily, stock: StableDiffusionXLPipeline) -> None:
    own = stock.scheduler
    stock.scheduler = diffusers.DDIMScheduler.from_config(own.config)
    try:
        expected = theirs(stock, 5, prompt=PROMPT, num_inference_steps=4, eta=0.7)
    finally:
        stock.scheduler = own
    picture = ours(family, prompt=PROMPT, seed=5, num_inference_steps=4, eta=0.7, scheduler="DDIM")
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_scheduler_paints_or_says_why_not_at_few_steps(family: SdxlFamily, name: str, steps: int) -> None:
    try:
        picture = ours(family, prompt=PROMPT, seed=5, num_inference_steps=steps, scheduler=name)
    except InvalidRequest as error:
        assert name in str(error)
    except GenerationFailed as error:
        assert "not finite" in str(error)
    else:
        assert picture.shape == (128, 128, 3)


@pytest.mark.parametrize(
    "name", ["euler", "EulerDiscreteScheduler", "dpm++ 2m karras", "DPM++2M Karras", "dpmpp_2m_karras"]
)
def test_scheduler_names_are_read_as_people_write_them(family: SdxlFamily, name: str) -> None:
    assert family.resolve(GenerateRequest(prompt="p", scheduler=name)).scheduler in {*NAMES, "EulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"height": 100}, "height must be a multiple of 8, not 100; the nearest fitting: 96 and 104"),
        ({"width": 9}, "width must be a multiple of 8, not 9; the nearest fitting: 8 and 16"),
        ({"clip_skip": 3}, "clip_skip must be at most 2"),
        ({"scheduler": "Eular"}, "did you mean 'Euler'"),
        ({"scheduler": "magic"}, "there are Euler"),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_what_it_can(
    family: SdxlFamily, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        family.resolve(GenerateRequest(prompt=PROMPT, **parameters))


@pytest.mark.parametrize(
    ("common", "idle", "message"),
    [
        ({"guidance_scale": 1.0}, {"negative_prompt": "x"}, "no effect without guidance"),
        ({}, {"negative_prompt_2": "x"}, "no effect without negative_prompt"),
        ({"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, "guidance_rescale has no effect without guidance"),
        (
            {"guidance_scale": 1.0},
            {"negative_original_size": (8, 8), "negative_target_size": (8, 8)},
            "negative_original_size and negative_target_size have no effect without guidance",
        ),
        ({}, {"negative_original_size": (8, 8)}, "has no effect without negative_target_size"),
        ({}, {"negative_target_size": (8, 8)}, "has no effect without negative_original_size"),
        (
            {},
            {"negative_crops_coords_top_left": (8, 8)},
            "negative_crops_coords_top_left has no effect without negative_original_size and negative_target_size",
        ),
        (
            {"image": picture(), "strength": 0.6},
            {"negative_crops_coords_top_left": (40, 40)},
            "negative_crops_coords_top_left has no effect with an image",
        ),
        ({}, {"eta": 0.5}, "eta has no effect with the scheduler EulerDiscreteScheduler"),
        ({"scheduler": "Euler a"}, {"eta": 0.5}, "eta has no effect with the scheduler Euler a"),
        ({"scheduler": "LCM"}, {"timestep_spacing": "trailing"}, "timestep_spacing has no effect with the scheduler"),
        ({"scheduler": "TCD", "eta": 0.3}, {"timestep_spacing": "linspace"}, "timestep_spacing has no effect"),
        ({"scheduler": "DPM++ 2M Karras"}, {"timestep_spacing": "linspace"}, "timestep_spacing has no effect"),
        (
            {"scheduler": "DPM++ 2M", "use_karras_sigmas": True},
            {"timestep_spacing": "linspace"},
            "timestep_spacing has no effect with the scheduler DPM++ 2M and use_karras_sigmas.",
        ),
    ],
)
def test_what_has_no_effect_is_said(
    family: SdxlFamily, common: dict[str, Any], idle: dict[str, Any], message: str
) -> None:
    common = {"prompt": PROMPT, "seed": 4, "num_inference_steps": 3, **common}
    check_idle(family, common, idle, message)


@pytest.mark.parametrize(
    "parameters",
    [
        {"negative_original_size": (64, 64), "negative_target_size": (8, 8), "negative_crops_coords_top_left": (9, 9)},
        {"image": picture(), "strength": 0.9, "negative_target_size": (8, 8)},
        {"scheduler": "DDIM", "eta": 0.9},
        {"scheduler": "Euler Karras", "timestep_spacing": "trailing"},
        {"guidance_rescale": 0.7},
        {"sigmas": (14.0, 3.0, 0.0)},
        {"denoising_end": 0.8},
    ],
)
def test_what_has_an_effect_is_not_warned_of(family: SdxlFamily, parameters: dict[str, Any]) -> None:
    assert family.warnings(resolved(family, prompt=PROMPT, **parameters)) == ()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sigmas": (14.0, 3.0, 0.5)}, "sigmas end with 0.5 and not 0, so that the picture keeps this noise"),
        ({"denoising_end": 0.01, "num_inference_steps": 4}, "no step to do, so that the picture is noise"),
        (
            {"image": picture(), "strength": 0.3, "denoising_end": 0.5, "num_inference_steps": 5},
            "no step to do, so that the picture is the image with noise on it",
        ),
        (
            {
                "image": picture(),
                "mask_image": mask(),
                "strength": 1.0,
                "denoising_end": 0.01,
                "num_inference_steps": 4,
            },
            "no step to do, so that the picture is noise",
        ),
    ],
)
def test_noise_that_stays_in_the_picture_is_said(family: SdxlFamily, parameters: dict[str, Any], message: str) -> None:
    (sentence,) = family.warnings(resolved(family, prompt=PROMPT, **parameters))
    assert message in sentence


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 150])
def test_the_strength_that_a_sentence_advises_is_enough(family: SdxlFamily, steps: int) -> None:
    asked = {"prompt": PROMPT, "image": picture(), "num_inference_steps": steps}
    with pytest.raises(InvalidRequest) as refused:
        resolved(family, **asked, strength=0.99 / steps)
    (advised,) = re.findall(r"a strength of at least ([\d.]+)\.$", str(refused.value))
    assert resolved(family, **asked, strength=float(advised)).strength == float(advised)


def test_numbers_that_are_not_finite_are_an_error_and_never_a_black_picture(family: SdxlFamily) -> None:
    request = family.resolve(GenerateRequest(prompt=PROMPT, seed=1, num_inference_steps=1))
    job = family.begin(request, family.encode(request))
    family.step([job])
    job.latents = job.latents * float("nan")
    with pytest.raises(GenerationFailed, match="not finite"):
        family.decode([job])


def test_a_full_device_is_our_own_error_and_the_next_request_is_painted(
    family: SdxlFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(family._base.unet, "forward", full)
        with pytest.raises(OutOfMemory, match="too little memory"):
            ours(family, prompt=PROMPT, seed=1, num_inference_steps=1)
    assert ours(family, prompt=PROMPT, seed=1, num_inference_steps=1).shape == (128, 128, 3)


def test_a_request_without_surprises_has_no_warnings(family: SdxlFamily) -> None:
    assert family.warnings(family.resolve(GenerateRequest(prompt=PROMPT, negative_prompt="x"))) == ()
