"""Protocol v1's messages: instances to requests, and pictures to predictions."""

from __future__ import annotations

import base64
import inspect
import json
from typing import Any

import pytest
from diffusers import (
    FluxPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from app.errors import InvalidRequest
from app.generation import (
    PARAMETERS,
    GeneratedImage,
    GenerateRequest,
    Generation,
    ImageFormat,
    Pixels,
    Timings,
)
from app.parameters import ALIASES
from app.protocol.v1 import NOT_OVER_JSON, parse_predict, write_predictions

FILE = base64.b64encode(b"a file").decode()


def requests(*instances: Any) -> tuple[GenerateRequest, ...]:
    return parse_predict(json.dumps({"instances": instances}).encode()).requests


def request(**keywords: Any) -> GenerateRequest:
    (only,) = requests({"prompt": "a cat", **keywords})
    return only


def complaint(document: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse_predict(json.dumps(document).encode())
    return str(caught.value)


# --- Reading ---------------------------------------------------------------------------------------------------


def test_an_instance_as_the_old_clients_send_it_is_read_with_lists_as_tuples() -> None:
    assert request(
        guidance_scale=8.0,
        num_inference_steps=50,
        crops_coords_top_left=[256, 0],
        width=1024,
        height=512,
        denoising_limit=0.8,
    ) == GenerateRequest(
        prompt="a cat",
        guidance_scale=8.0,
        num_inference_steps=50,
        crops_coords_top_left=(256, 0),
        width=1024,
        height=512,
        denoising_limit=0.8,
    )


def test_all_instances_are_read_in_order() -> None:
    assert [(each.prompt, each.seed) for each in requests({"prompt": "a", "seed": 1}, {"prompt": "b"})] == [
        ("a", 1),
        ("b", None),
    ]


def test_every_parameter_can_be_given() -> None:
    given: dict[str, Any] = {
        "prompt": "a", "prompt_2": "b", "negative_prompt": "c", "negative_prompt_2": "d", "height": 64, "width": 72.0,
        "num_inference_steps": 9, "guidance_scale": 7, "guidance_rescale": 0.5, "guidance_end": 0.5,
        "true_cfg_scale": 2, "image": FILE, "mask_image": FILE, "strength": 0.5, "seed": 2**63 - 1,
        "num_images_per_prompt": 2, "clip_skip": 1, "scheduler": "Euler",
        "use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False,
        "timestep_spacing": "Trailing", "timesteps": [999, 1.5], "sigmas": [1], "eta": 0.5,
        "original_size": [1, 2], "crops_coords_top_left": [3, 4], "target_size": [5, 6],
        "negative_original_size": [7, 8], "negative_crops_coords_top_left": [9, 10], "negative_target_size": [11, 12],
        "aesthetic_score": 6, "negative_aesthetic_score": 2.5, "denoising_limit": 0.8, "denoising_end": 0.9,
        "max_sequence_length": 77, "loras": {"style": 0.5, "detail": 1}, "output_format": "jpg",
    }  # fmt: skip
    assert set(given) == set(PARAMETERS)
    (read,) = requests(given)
    expected: dict[str, Any] = {
        **given, "image": b"a file", "mask_image": b"a file", "timestep_spacing": "trailing",
        "timesteps": (999.0, 1.5), "sigmas": (1.0,), "loras": (("style", 0.5), ("detail", 1.0)),
        "output_format": ImageFormat.JPEG,
        **{name: tuple(value) for name, value in given.items() if name.endswith(("_size", "_left"))},
    }  # fmt: skip
    assert read == GenerateRequest(**expected)


@pytest.mark.parametrize(
    "pipeline",
    [StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, FluxPipeline],
)
def test_every_keyword_of_a_stock_pipeline_is_read_or_refused_by_its_name(pipeline: type) -> None:
    keywords = set(inspect.signature(pipeline.__call__).parameters) - {"self", "kwargs"}
    assert keywords <= {*PARAMETERS, *NOT_OVER_JSON}


@pytest.mark.parametrize("name", sorted(NOT_OVER_JSON))
def test_a_keyword_that_no_request_can_carry_is_refused_with_what_to_do_instead(name: str) -> None:
    sentence = complaint({"instances": [{"prompt": "a"}, {"prompt": "b", name: [0.5]}]})
    assert sentence.startswith(f"instances[1]: {name} ") and sentence.endswith(".")


def test_the_generator_is_replaced_by_a_seed() -> None:
    assert "send a number as seed" in complaint({"instances": [{"prompt": "a", "generator": 7}]})


@pytest.mark.parametrize("name", sorted({*PARAMETERS, *NOT_OVER_JSON, *ALIASES} - {"prompt"}))
def test_null_means_not_given(name: str) -> None:
    assert request(**{name: None}) == request()


def test_values_that_change_nothing_are_taken() -> None:
    assert request(output_type="pil", return_dict=True) == request(return_dict=False) == request()


def test_another_name_of_a_parameter_is_read_but_not_beside_it() -> None:
    assert request(high_noise_frac=0.7) == request(denoising_limit=0.7)
    both = {"prompt": "a", "denoising_limit": 0.7, "high_noise_frac": 0.7}
    assert "given twice" in complaint({"instances": [both]})


@pytest.mark.parametrize(
    "image", [FILE, f"data:image/png;base64,{FILE}", {"b64": FILE}, {"format": "PNG", "b64": FILE}]
)
def test_an_image_comes_as_base64_or_as_a_prediction_holds_it(image: object) -> None:
    assert request(image=image).image == b"a file"


def test_inputs_may_stand_for_instances() -> None:
    assert parse_predict(b'{"inputs": [{"prompt": "a"}]}').requests == (GenerateRequest(prompt="a"),)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "The body must be a JSON object with a list of instances."),
        ({}, "instances is missing."),
        ({"instances": [{"prompt": "a"}], "inputs": []}, "Give instances or inputs, not both."),
        ({"instance": [{"prompt": "a"}]}, "'instance' is not a field of the protocol (did you mean 'instances'?)."),
        ({"instances": []}, "instances must be a list of at least one object, not []."),
        ({"instances": None}, "instances must be a list of at least one object, not null."),
        ({"inputs": {"prompt": "a"}}, "inputs must be a list of at least one object, not {'prompt': 'a'}."),
        ({"instances": ["a cat"]}, "instances[0] must be an object such as {'prompt': 'a cat'}, not 'a cat'."),
        ({"instances": [[{"prompt": "a"}]]}, "instances[0] must be an object"),
        ({"instances": [{"prompt": "a"}, {}]}, "instances[1].prompt is missing."),
        ({"instances": [{"prompt": None}]}, "instances[0].prompt is missing."),
        ({"instances": [{"prompt": ["a", "b"]}]}, "instances[0]: prompt must be text, not ['a', 'b']."),
        ({"instances": [{"prompt": "a", "num_steps": None}]}, "There is no parameter 'num_steps'"),
        ({"instances": [{"prompt": "a", "wdith": 8}]}, "There is no parameter 'wdith' (did you mean 'width'?)."),
        ({"instances": [{"prompt": "a", "width": "1024"}]}, "width must be a whole number, not '1024'."),
        ({"instances": [{"prompt": "a", "width": [1024]}]}, "width must be a whole number, not [1024]."),
        ({"instances": [{"prompt": "a", "seed": -1}]}, "instances[0]: seed must be at least 0, not -1."),
        ({"instances": [{"prompt": "a", "seed": True}]}, "seed must be a whole number, not true."),
        ({"instances": [{"prompt": "a", "target_size": [8]}]}, "target_size must be two whole numbers, not [8]."),
        ({"instances": [{"prompt": "a", "target_size": 8}]}, "target_size must be two whole numbers, not 8."),
        ({"instances": [{"prompt": "a", "sigmas": []}]}, "sigmas must be 1 to 1000 numbers, not []."),
        ({"instances": [{"prompt": "a", "sigmas": 1}]}, "sigmas must be 1 to 1000 numbers, not 1."),
        ({"instances": [{"prompt": "a", "loras": 7}]}, "loras must be names such as 'style:0.8, detail', not 7."),
        ({"instances": [{"prompt": "a", "loras": {"style": "1"}}]}, "loras must be a finite number, not '1'."),
        ({"instances": [{"prompt": "a", "image": "http://x/y.png"}]}, "addresses and file names are not read"),
        ({"instances": [{"prompt": "a", "image": 7}]}, "image must be a picture's file as base64 text, not 7."),
        ({"instances": [{"prompt": "a", "image": {"url": "x"}}]}, "image must be a picture's file as base64 text"),
        ({"instances": [{"prompt": "a", "output_type": "np"}]}, "output_type may only be 'pil'"),
        ({"instances": [{"prompt": "a", "output_format": "gif"}]}, "output_format must be one of png, jpeg, webp"),
        ({"instances": [{"prompt": "a\0b"}]}, "prompt holds a NUL character."),
        ({"instances": [{"prompt": "a"}] * 8193}, "instances may have at most 8192 members, not 8193."),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(document: Any, says: str) -> None:
    assert says in complaint(document)


def test_a_body_that_is_no_strict_json_is_refused() -> None:
    for body in (
        b"",
        b"{",
        b'{"instances": [{"prompt": "a", "guidance_scale": NaN}]}',
        b'{"instances": 1, "instances": 2}',
    ):
        with pytest.raises(InvalidRequest):
            parse_predict(body)


# --- Writing ---------------------------------------------------------------------------------------------------


def test_the_answer_is_one_prediction_for_each_picture_and_nothing_else() -> None:
    pixels = Pixels(b"\0\0\0", 1, 1)
    painted = [
        GeneratedImage(GenerateRequest(prompt="é"), 1, pixels, b"first"),
        GeneratedImage(GenerateRequest(prompt="b", output_format=ImageFormat.WEBP), 2, pixels, b"second"),
    ]
    answer = json.loads(write_predictions(Generation(tuple(painted), Timings()), "sdxl"))
    assert answer == {
        "predictions": [
            {"model_name": "sdxl", "prompt": "é", "image": {"format": "PNG", "b64": "Zmlyc3Q="}},
            {"model_name": "sdxl", "prompt": "b", "image": {"format": "WEBP", "b64": "c2Vjb25k"}},
        ]
    }
