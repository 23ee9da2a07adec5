"""What FLUX takes, refuses and warns of, before anything is painted."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from typing import Any

import pytest
from diffusers import FlowMatchHeunDiscreteScheduler

from app.engine.costs import rows_of
from app.engine.flux import FluxFamily
from app.engine.flux_requests import PARAMETERS as FLUX_PARAMETERS
from app.engine.flux_requests import WITHOUT_EFFECT
from app.engine.optimization import LOSSY_PARAMETERS
from app.errors import InvalidRequest
from app.generation import PARAMETERS, GenerateRequest, Pixels
from app.parameters import check_combinations
from tests.tiny_flux import make_flux


@pytest.fixture(scope="module")
def dev() -> FluxFamily:
    return FluxFamily(make_flux())


@pytest.fixture(scope="module")
def schnell() -> FluxFamily:
    return FluxFamily(make_flux(guidance_embeds=False, use_dynamic_shifting=False))


def picture(width: int, height: int) -> Pixels:
    return Pixels(bytes(3 * width * height), height, width)


def test_defaults_are_the_pipelines_own(dev: FluxFamily, schnell: FluxFamily) -> None:
    request = dev.resolve(GenerateRequest(prompt="p"))
    assert (request.num_inference_steps, request.guidance_scale, request.true_cfg_scale) == (28, 3.5, 1.0)
    assert (request.max_sequence_length, request.strength) == (512, None)
    assert request.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert schnell.resolve(GenerateRequest(prompt="p")).guidance_scale is None


@pytest.mark.parametrize("mask", [None, picture(64, 48)])
def test_with_an_image_defaults_are_those_of_its_pipeline(dev: FluxFamily, mask: Pixels | None) -> None:
    request = dev.resolve(GenerateRequest(prompt="p", image=picture(64, 48), mask_image=mask))
    assert (request.height, request.width, request.strength, request.guidance_scale) == (48, 64, 0.6, 7.0)
    assert dev.resolve(GenerateRequest(prompt="p", image=picture(64, 48), width=32)).width == 32


def test_the_default_size_is_the_one_that_the_model_was_made_for(dev: FluxFamily) -> None:
    request = dev.resolve(GenerateRequest(prompt="p"))
    assert (request.height, request.width) == (64, 64)
    silent = make_flux()
    del silent.vae.config._use_default_values
    silent.vae.register_to_config(_use_default_values=["sample_size"])
    request = FluxFamily(silent).resolve(GenerateRequest(prompt="p"))
    assert (request.height, request.width) == (1024, 1024)


def test_what_is_resolved_resolves_to_itself(dev: FluxFamily, schnell: FluxFamily) -> None:
    for family in (dev, schnell):
        for extra in ({}, {"image": picture(64, 48)}, {"sigmas": (1.0, 0.5)}, {"scheduler": "heun"}):
            resolved = family.resolve(GenerateRequest(prompt="p", **extra))
            assert family.resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("parameters", "steps"),
    [
        ({}, 6),
        ({"scheduler": "Heun"}, 11),
        ({"image": picture(64, 48), "strength": 0.5}, 3),
        ({"image": picture(64, 48), "strength": 0.5, "scheduler": "Heun"}, 5),
    ],
)
def test_how_many_steps_there_will_be_is_known_before_they_begin(
    dev: FluxFamily, parameters: dict[str, Any], steps: int
) -> None:
    request = dev.resolve(GenerateRequest(prompt="p", seed=1, num_inference_steps=6, **parameters))
    assert dev.steps(request) == steps == dev.begin(request, dev.encode(request)).num_steps


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("Euler", "Euler"),
        ("euler", "Euler"),
        ("FlowMatchEuler", "Euler"),
        ("flow_match_euler_discrete", "Euler"),
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
        ("Flow Match Heun", "Heun"),
        ("default", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_scheduler_names_are_read_as_people_write_them(dev: FluxFamily, name: str, resolved: str) -> None:
    assert dev.resolve(GenerateRequest(prompt="p", scheduler=name)).scheduler == resolved


def test_a_folder_may_name_heun_as_its_scheduler() -> None:
    pipeline = make_flux()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    family = FluxFamily(pipeline)
    request = family.resolve(GenerateRequest(prompt="p", seed=1, num_inference_steps=3))
    assert family.begin(request, family.encode(request)).num_steps == 5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"height": 72}, "height must be a multiple of 16, not 72; the nearest fitting: 64 and 80"),
        ({"width": 8}, "width must be a multiple of 16, not 8; the nearest fitting: 16"),
        ({"image": picture(64, 50)}, "50 pixels high and 64 wide, .* multiples of 16; give .*, such as 48 and 64"),
        ({"image": picture(70, 64), "height": 32}, "64 pixels high and 70 wide, .*, such as 64 and 64"),
        ({"image": picture(64, 64), "strength": 0.0}, "strength must be more than 0"),
        ({"scheduler": "DPM++ 2M"}, "no scheduler 'DPM[+][+] 2M' for FLUX; there are Euler, Heun"),
        ({"scheduler": "x" * 500}, r"no scheduler 'x{27}\.\.\.x{28}' for FLUX"),
        ({"scheduler": "Heun", "sigmas": (1.0,)}, "sigmas needs the scheduler Euler"),
        ({"scheduler": "Heun", "use_beta_sigmas": True}, "use_beta_sigmas needs the scheduler Euler"),
        ({"sigmas": (1.0, 0.0)}, "to more than 0"),
        ({"sigmas": (14.6, 1.0)}, "from at most 1"),
        ({"prompt": "x" * 600}, "prompt has 602 tokens, 90 more than max_sequence_length .512.; shorten it"),
        ({"prompt": "x" * 99, "max_sequence_length": 64}, "101 tokens, 37 more .* larger max_sequence_length"),
        ({"prompt_2": "x" * 600}, "prompt_2 has 602 tokens"),
        ({"negative_prompt": "x" * 600, "true_cfg_scale": 2.0}, "negative_prompt has 602 tokens"),
        (
            {"negative_prompt": "x", "negative_prompt_2": "x" * 600, "true_cfg_scale": 2.0},
            "negative_prompt_2 has 602 tokens",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_what_it_can(
    dev: FluxFamily, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        dev.resolve(GenerateRequest(**{"prompt": "p", **parameters}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_rescale", 0.7),
        ("clip_skip", 1),
        ("denoising_end", 0.8),
        ("eta", 0.0),
        ("timesteps", (999.0, 1.0)),
        ("timestep_spacing", "trailing"),
        ("negative_original_size", (512, 512)),
        ("negative_crops_coords_top_left", (0, 0)),
        ("negative_target_size", (512, 512)),
        ("aesthetic_score", 6.0),
        ("negative_aesthetic_score", 2.5),
    ],
)
def test_parameters_of_sdxl_alone_are_refused(dev: FluxFamily, name: str, value: Any) -> None:
    request = dataclasses.replace(GenerateRequest(prompt="p"), **{name: value})
    with pytest.raises(InvalidRequest, match=f"This model does not take {name}"):
        check_combinations(request, dev.parameters)


def test_every_parameter_is_known_to_flux_or_to_sdxl_alone(dev: FluxFamily) -> None:
    assert FLUX_PARAMETERS | set(WITHOUT_EFFECT) <= set(PARAMETERS)
    assert dev.parameters == (FLUX_PARAMETERS | set(WITHOUT_EFFECT)) - LOSSY_PARAMETERS - {"loras"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"denoising_limit": 0.8}, "denoising_limit has no effect on FLUX"),
        (
            {"original_size": (1024, 1024), "crops_coords_top_left": (0, 0), "target_size": (1024, 1024)},
            "original_size, crops_coords_top_left, target_size have no effect",
        ),
        ({"negative_prompt": "x"}, "no effect without a true_cfg_scale above 1"),
        ({"negative_prompt_2": "x"}, "no effect without a true_cfg_scale above 1"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale has no effect without negative_prompt"),
        ({"true_cfg_scale": 4.0, "negative_prompt_2": "x"}, "true_cfg_scale has no effect without negative_prompt"),
    ],
)
def test_what_has_no_effect_is_said(dev: FluxFamily, parameters: dict[str, Any], message: str) -> None:
    (sentence,) = dev.warnings(dev.resolve(GenerateRequest(prompt="p", **parameters)))
    assert message in sentence


def test_guidance_has_no_effect_on_a_model_made_to_do_without(schnell: FluxFamily) -> None:
    (sentence,) = schnell.warnings(schnell.resolve(GenerateRequest(prompt="p", guidance_scale=3.5)))
    assert "guidance_scale has no effect" in sentence


def test_a_request_without_surprises_has_no_warnings(dev: FluxFamily, schnell: FluxFamily) -> None:
    for request in (
        GenerateRequest(prompt="p", guidance_scale=0.0),
        GenerateRequest(prompt="p " * 100, max_sequence_length=512),
        GenerateRequest(prompt="p", negative_prompt="x", true_cfg_scale=4.0),
        GenerateRequest(prompt="p", negative_prompt=""),
    ):
        assert dev.warnings(dev.resolve(request)) == schnell.warnings(schnell.resolve(request)) == ()


@pytest.mark.parametrize(
    "parameters",
    [{}, {"true_cfg_scale": 3.0}, {"negative_prompt": "x"}, {"true_cfg_scale": 3.0, "negative_prompt": ""}],
)
def test_the_queue_expects_as_many_rows_as_come(dev: FluxFamily, parameters: dict[str, Any]) -> None:
    request = dev.resolve(GenerateRequest(prompt="p", seed=1, **parameters))
    assert rows_of(request) == dev.rows(dev.begin(request, dev.encode(request)))


def test_many_threads_may_resolve_while_the_device_thread_encodes(dev: FluxFamily) -> None:
    requests = [GenerateRequest(prompt=f"{i} " * (i % 30), max_sequence_length=128) for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        resolved = pool.map(dev.resolve, requests)
        for request in requests[:50]:
            dev.encode(dataclasses.replace(request, prompt=request.prompt + "!", max_sequence_length=128))
        assert len(list(resolved)) == 200
