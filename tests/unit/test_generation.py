"""The shared vocabulary: values are taken exactly or not at all, and limits are named."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.generation import MAX_SEED, PARAMETERS, GenerateRequest, ImageFormat, Kind, Limits, Pixels
from app.parameters import check_combinations, check_limits, parse_parameter
from app.sentences import SYNONYMS, describe, nearest

LIMITS = Limits(max_steps=50, max_pixels=1024 * 1024, max_images_per_request=4, max_prompt_length=100)


def test_every_field_of_a_request_is_a_described_parameter() -> None:
    assert list(PARAMETERS) == [field.name for field in fields(GenerateRequest)]
    assert all(parameter.description.endswith(".") for parameter in PARAMETERS.values())
    assert [parameter.name for parameter in PARAMETERS.values() if parameter.required] == ["prompt"]


@given(st.integers(0, MAX_SEED))
def test_a_seed_is_taken_exactly(seed: int) -> None:
    assert parse_parameter("seed", seed) == seed


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_inference_steps", 20.0, 20),
        ("guidance_scale", 7, 7.0),
        ("output_format", "JPG", ImageFormat.JPEG),
        ("output_format", "image/webp", ImageFormat.WEBP),
        ("target_size", [512, 768.0], (512, 768)),
        ("prompt", "", ""),
    ],
)
def test_a_value_that_says_the_same_is_taken(name: str, value: Any, expected: Any) -> None:
    parsed = parse_parameter(name, value)
    assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "at most 9223372036854775807"),
        ("seed", 10**4000, "more than 30 digits"),
        ("num_inference_steps", 0, "at least 1"),
        ("num_inference_steps", 2.5, "whole number, not 2.5"),
        ("num_inference_steps", True, "whole number"),
        ("num_inference_steps", "20", "whole number"),
        ("num_inference_steps", float("inf"), "whole number"),
        ("guidance_scale", float("nan"), "finite"),
        ("guidance_scale", -0.1, "at least 0"),
        ("guidance_scale", 10**400, "at most 100"),
        ("target_size", [8, 2**40], "at most 65504"),
        ("guidance_rescale", 1.1, "at most 1"),
        ("denoising_end", 1.5, "at most 1"),
        ("target_size", [1, 2, 3], "two whole numbers"),
        ("target_size", "1x2", "two whole numbers"),
        ("output_format", "gif", "png, jpeg, webp"),
        ("prompt", 5, "must be text"),
        ("prompt", None, "must be text"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_a_sentence(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        parse_parameter(name, value)
    assert name in str(refused.value) and len(str(refused.value)) < 200


@given(st.sampled_from(sorted(PARAMETERS)), st.none() | st.booleans() | st.floats() | st.integers() | st.text())
def test_any_value_is_taken_or_refused_never_changed(name: str, value: Any) -> None:
    try:
        parsed = parse_parameter(name, value)
    except InvalidRequest:
        return
    if PARAMETERS[name].kind not in (Kind.TEXT, Kind.ADAPTERS):
        assert parsed == value


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_inference_steps": 51}, "at most 50, not 51.*max_steps"),
        ({"num_inference_steps": 10**40}, "max_steps"),
        ({"height": 2048, "width": 1024}, "1048576 pixels.*max_pixels"),
        ({"num_images_per_prompt": 5}, "at most 4 images.*max_images_per_request"),
        ({"prompt": "x" * 101}, "prompt must have at most 100 characters"),
        ({"negative_prompt_2": "x" * 101}, "negative_prompt_2 must have at most 100 characters"),
        ({"height": 4096, "width": 8}, "height must be at most 2048, not 4096.*max_side"),
        ({"timesteps": (9.0,) * 51}, "timesteps may have at most 50 numbers, not 51.*max_steps"),
        ({"sigmas": (9.0,) * 52}, "sigmas may have at most 51 numbers, not 52.*max_steps"),
    ],
)
def test_what_is_too_much_is_refused_by_the_name_of_the_limit(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_limits([GenerateRequest(**{"prompt": "p", **parameters})], LIMITS)


@pytest.mark.parametrize(("height", "width"), [(8, 4096), (1024, 2048)])
def test_an_image_whose_own_size_is_too_much_is_said_to_be_resized_where_a_size_is_given(
    height: int, width: int
) -> None:
    image = Pixels(bytes(3 * height * width), height, width)
    with pytest.raises(InvalidRequest, match=r"setting max_.*give height and width to have it resized\.$"):
        check_limits([GenerateRequest(prompt="p", image=image, height=height, width=width)], LIMITS)


def test_of_several_prompts_the_one_that_is_refused_is_named() -> None:
    fine, long = GenerateRequest(prompt="p"), GenerateRequest(prompt="x" * 101)
    with pytest.raises(InvalidRequest, match=r"^Prompt 2 of 3: prompt must have at most 100 characters"):
        check_limits([fine, long, long], LIMITS)
    with pytest.raises(InvalidRequest, match=r"^prompt must have at most 100 characters"):
        check_limits([long, long], LIMITS)


def test_images_of_all_prompts_count_together() -> None:
    pair = GenerateRequest(prompt="p", num_images_per_prompt=2)
    check_limits([pair, pair], LIMITS)
    with pytest.raises(InvalidRequest, match="at most 4 images"):
        check_limits([pair, pair, GenerateRequest(prompt="p")], LIMITS)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"denoising_end": 0.0}, "denoising_end must be more than 0"),
        ({"denoising_limit": 0.0}, "denoising_limit must be more than 0"),
        ({"strength": 0.5}, "strength needs the input image"),
        ({"mask_image": b"x"}, "mask_image needs the input image"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas and use_beta_sigmas"),
        ({"timesteps": (2.0, 1.0), "sigmas": (2.0, 1.0)}, "timesteps or sigmas, not both"),
        ({"timesteps": (1.0, 2.0)}, "timesteps must fall"),
        ({"sigmas": (2.0, 2.0)}, "sigmas must fall"),
        ({"sigmas": (1e-46, 0.0)}, "sigmas must fall"),
        ({"sigmas": (2.0, 2.0 - 1e-9, 0.0)}, "sigmas must fall"),
        ({"timesteps": (2.5, 1.0)}, "timesteps must be whole numbers"),
        ({"sigmas": (2.0, 1.0), "num_inference_steps": 3}, "has 2 numbers, so leave num_inference_steps out"),
        ({"timesteps": (999.0,), "num_inference_steps": 3}, "has 1 number, so leave num_inference_steps out"),
        ({"sigmas": (2.0, 1.0), "use_karras_sigmas": True}, "sigmas and use_karras_sigmas contradict"),
        ({"timesteps": (2.0, 1.0), "timestep_spacing": "leading"}, "timesteps and timestep_spacing contradict"),
        ({"max_sequence_length": 8}, "does not take max_sequence_length"),
    ],
)
def test_what_contradicts_itself_or_the_model_is_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_combinations(GenerateRequest(**{"prompt": "p", **parameters}), set(PARAMETERS) - {"max_sequence_length"})


def test_what_agrees_is_taken_together() -> None:
    together: tuple[dict[str, Any], ...] = (
        {"sigmas": (2.0, 1.0, 0.0), "num_inference_steps": 3, "use_karras_sigmas": False},
        {"image": b"x", "mask_image": b"y", "strength": 0.0},
        {"use_karras_sigmas": True, "use_beta_sigmas": False, "timestep_spacing": "leading"},
    )
    for parameters in together:
        check_combinations(GenerateRequest(prompt="p", **parameters), PARAMETERS)


def test_what_others_call_a_parameter_is_suggested_by_its_name_here() -> None:
    for word, names in SYNONYMS.items():
        assert set(names) <= set(PARAMETERS) and word not in PARAMETERS
    assert nearest("Steps", PARAMETERS) == " (did you mean 'num_inference_steps'?)"
    assert nearest("cfg-scale", PARAMETERS) == " (did you mean 'guidance_scale'?)"
    assert nearest("size", PARAMETERS) == " (did you mean 'height' and 'width'?)"
    assert nearest("steps", ["inputs", "outputs"]) == ""


def test_whatever_stands_in_a_sentence_is_short() -> None:
    for value in ("x" * 10**6, b"x" * 10**6, [[1] * 1000] * 1000, 10**4000, {"x" * 1000: ["y" * 1000]}, [10**4000]):
        assert len(describe(value)) <= 60
    assert describe([1, 2]) == "[1, 2]" and describe("it's") == '"it\'s"'


def test_the_nearest_known_name_is_suggested_only_when_it_is_near() -> None:
    assert nearest("promt", PARAMETERS) == " (did you mean 'prompt'?)"
    assert nearest("zzzz", PARAMETERS) == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stepz", "num_inference_steps"),
        ("cfg_scal", "guidance_scale"),
        ("true_cfg_scal", "true_cfg_scale"),
        ("guidance_scal", "guidance_scale"),
        ("sampler_index", "scheduler"),
        ("denoising_start", "denoising_limit"),
    ],
)
def test_a_misspelt_word_of_others_is_understood_too(name: str, meant: str) -> None:
    assert nearest(name, PARAMETERS) == f" (did you mean '{meant}'?)"


@pytest.mark.parametrize("name", ["style", "an", "quality"])
def test_a_word_that_only_resembles_one_of_others_gets_no_hint(name: str) -> None:
    assert nearest(name, PARAMETERS) == ""
