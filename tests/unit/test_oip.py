"""Open Inference Protocol messages, bytes to requests and pictures to bytes."""

from __future__ import annotations

import base64
import gc
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.generation import (
    PARAMETERS,
    GeneratedImage,
    GenerateRequest,
    Generation,
    ImageFormat,
    Kind,
    Pixels,
    Timings,
)
from app.protocol.infer_request import parse_infer
from app.protocol.oip import InferCall, check_pixels, model_metadata, server_metadata, write_infer
from app.protocol.strict_json import parse_json
from app.protocol.tensors import write_strings

PROMPT = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a cat"]}


def body(*inputs: dict[str, Any], **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **rest}).encode()


def parse(*inputs: dict[str, Any], **rest: Any) -> InferCall:
    return parse_infer(body(*inputs, **rest), None)


def binary(head: dict[str, Any], tail: bytes) -> InferCall:
    text = json.dumps(head).encode()
    return parse_infer(text + tail, str(len(text)))


def tensor(name: str, datatype: str, data: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(data)], "datatype": datatype, "data": data}


# --- Reading ---------------------------------------------------------------------------------------------------


def test_a_prompt_alone_is_a_request_with_every_default() -> None:
    call = parse(PROMPT)
    assert call.requests == (GenerateRequest(prompt="a cat"),)
    assert call.id is None and call.timeout is None and call.given == {"prompt"}
    assert [(output.name, output.binary) for output in call.outputs] == [("image", False), ("seed", False)]


def test_every_parameter_can_come_as_an_input() -> None:
    call = parse(
        PROMPT,
        tensor("prompt_2", "BYTES", ["b"]),
        tensor("negative_prompt", "BYTES", ["c"]),
        tensor("negative_prompt_2", "BYTES", ["d"]),
        tensor("height", "INT32", [512]),
        tensor("width", "UINT16", [768]),
        tensor("num_inference_steps", "FP32", [20.0]),
        tensor("guidance_scale", "INT8", [7]),
        tensor("guidance_rescale", "FP64", [0.5]),
        tensor("seed", "UINT64", [2**63 - 1]),
        tensor("num_images_per_prompt", "INT64", [1]),
        tensor("clip_skip", "UINT8", [1]),
        tensor("scheduler", "BYTES", ["Euler a"]),
        tensor("original_size", "INT64", [1024, 768]),
        tensor("crops_coords_top_left", "INT64", [[0, 64]], [1, 2]),
        tensor("target_size", "INT64", [512, 512]),
        tensor("guidance_end", "FP32", [0.5]),
        tensor("true_cfg_scale", "FP32", [1.5]),
        tensor("image", "BYTES", ["AAE="]),
        tensor("mask_image", "UINT8", [0, 255], [1, 2]),
        tensor("strength", "FP32", [0.5]),
        tensor("use_karras_sigmas", "BOOL", [True]),
        tensor("use_exponential_sigmas", "BOOL", [False]),
        tensor("use_beta_sigmas", "BOOL", [False]),
        tensor("timestep_spacing", "BYTES", ["Trailing"]),
        tensor("timesteps", "INT64", [999, 500]),
        tensor("sigmas", "FP32", [14.5, 1.0, 0.5]),
        tensor("eta", "FP32", [0.25]),
        tensor("negative_original_size", "INT64", [1, 2]),
        tensor("negative_crops_coords_top_left", "INT64", [3, 4]),
        tensor("negative_target_size", "INT64", [5, 6]),
        tensor("aesthetic_score", "FP32", [6.5]),
        tensor("negative_aesthetic_score", "FP32", [2.5]),
        tensor("high_noise_frac", "FP32", [0.875]),
        tensor("denoising_end", "FP32", [0.75]),
        tensor("max_sequence_length", "INT64", [256]),
        tensor("loras", "BYTES", ["style:0.5, detail"]),
        tensor("output_format", "BYTES", ["jpg"]),
    )
    assert call.given == set(PARAMETERS)
    assert call.requests == (
        GenerateRequest(
            prompt="a cat",
            prompt_2="b",
            negative_prompt="c",
            negative_prompt_2="d",
            height=512,
            width=768,
            num_inference_steps=20,
            guidance_scale=7.0,
            guidance_rescale=0.5,
            seed=2**63 - 1,
            num_images_per_prompt=1,
            clip_skip=1,
            scheduler="Euler a",
            original_size=(1024, 768),
            crops_coords_top_left=(0, 64),
            target_size=(512, 512),
            guidance_end=0.5,
            true_cfg_scale=1.5,
            image=b"\0\1",
            mask_image=Pixels(b"\0\xff", height=1, width=2, channels=1),
            strength=0.5,
            use_karras_sigmas=True,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
            timestep_spacing="trailing",
            timesteps=(999.0, 500.0),
            sigmas=(14.5, 1.0, 0.5),
            eta=0.25,
            negative_original_size=(1, 2),
            negative_crops_coords_top_left=(3, 4),
            negative_target_size=(5, 6),
            aesthetic_score=6.5,
            negative_aesthetic_score=2.5,
            denoising_limit=0.875,
            denoising_end=0.75,
            max_sequence_length=256,
            loras=(("style", 0.5), ("detail", 1.0)),
            output_format=ImageFormat.JPEG,
        ),
    )


SCALARS: dict[Kind, Any] = {
    Kind.TEXT: "png",
    Kind.INTEGER: 8,
    Kind.NUMBER: 0.5,
    Kind.BOOLEAN: True,
    Kind.ADAPTERS: "style:0.5",
}


@pytest.mark.parametrize("name", [name for name, p in PARAMETERS.items() if p.kind in SCALARS])
def test_every_scalar_can_come_as_a_request_parameter(name: str) -> None:
    value = "leading" if name == "timestep_spacing" else SCALARS[PARAMETERS[name].kind]
    call = parse(*([] if name == "prompt" else [PROMPT]), parameters={name: value})
    assert getattr(call.requests[0], name) == ((("style", 0.5),) if name == "loras" else value)


@pytest.mark.parametrize("name", [name for name, p in PARAMETERS.items() if p.kind not in SCALARS])
def test_pairs_lists_and_images_are_inputs_and_nothing_else(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is an? .* give it as an input"):
        parse(PROMPT, parameters={name: "AAEC"})


def test_one_value_serves_all_prompts_and_several_go_one_to_each() -> None:
    call = parse(
        tensor("prompt", "BYTES", ["a", "b", "c"]),
        tensor("seed", "INT64", [5]),
        tensor("guidance_scale", "FP32", [1.0, 2.0, 3.0]),
        tensor("target_size", "INT64", [8, 8, 16, 16, 24, 24], [3, 2]),
    )
    assert [(r.prompt, r.seed, r.guidance_scale, r.target_size) for r in call.requests] == [
        ("a", 5, 1.0, (8, 8)),
        ("b", 5, 2.0, (16, 16)),
        ("c", 5, 3.0, (24, 24)),
    ]


def test_binary_inputs_are_read_in_the_order_of_the_tensors() -> None:
    tail = write_strings(["ein Kätzchen".encode()]) + struct.pack("<q", 42)
    call = binary(
        {
            "inputs": [
                {
                    "name": "prompt",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(tail) - 8},
                },
                tensor("width", "INT64", [64]),
                {"name": "seed", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
            ]
        },
        tail,
    )
    assert call.requests == (GenerateRequest(prompt="ein Kätzchen", width=64, seed=42),)


def test_a_raw_body_is_one_prompt_and_answers_in_binary() -> None:
    call = parse_infer("a café".encode(), "0")
    assert call.requests == (GenerateRequest(prompt="a café"),)
    assert all(output.binary for output in call.outputs)


def test_an_output_decides_for_itself_before_the_request_does() -> None:
    call = parse(
        PROMPT,
        parameters={"binary_data_output": True},
        outputs=[{"name": "seed", "parameters": {"binary_data": False}}, {"name": "pixels"}],
    )
    assert [(output.name, output.binary) for output in call.outputs] == [("seed", False), ("pixels", True)]


def test_a_timeout_is_given_in_microseconds_and_zero_means_none() -> None:
    assert parse(PROMPT, parameters={"timeout": 1_500_000}).timeout == 1.5
    assert parse(PROMPT, parameters={"timeout": 0}).timeout is None


def test_a_priority_of_zero_means_none() -> None:
    assert parse(PROMPT, parameters={"priority": 2}).priority == 2
    assert parse(PROMPT, parameters={"priority": 0}).priority is None


def test_nulls_count_as_absent() -> None:
    call = parse({**PROMPT, "parameters": None}, id=None, parameters=None, outputs=None)
    assert call.id is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"{", "not JSON", id="cut-off"),
        pytest.param(b"[]", "must be a JSON object", id="list"),
        pytest.param(b"{}", "inputs is missing", id="no-inputs"),
        pytest.param(b'{"inputs": {}}', "inputs must be a valid list", id="inputs-object"),
        pytest.param(b'{"inputs": []}', "prompt is missing", id="no-prompt"),
        pytest.param(b'{"inputs": [], "inptus": []}', "did you mean 'inputs'", id="misspelt-field"),
        pytest.param(b'{"inputs": [], "id": 5}', "id must be a valid string", id="integer-id"),
        pytest.param(b'{"inputs": [], "inputs": []}', "stands twice", id="field-twice"),
        pytest.param(b'{"inputs": [], "parameters": {"seed": NaN}}', "NaN is not JSON", id="nan"),
        pytest.param(b'{"inputs": [], "parameters": {"seed": -Infinity}}', "Infinity", id="infinity"),
        pytest.param(b'{"inputs": [], "parameters": {"guidance_scale": 1e999}}', "finite", id="infinite-literal"),
        pytest.param(b'{"inputs": [], "parameters": {"seed": ' + b"9" * 5000 + b"}}", "too many digits", id="digits"),
        pytest.param(b'{"inputs": ' + b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(b'{"inputs": [], "id": "\\ud800"}', "surrogate", id="surrogate"),
        pytest.param(b'{"inputs": [], "id": "\xff"}', "not UTF-8", id="not-utf-8"),
        pytest.param(b'{"inputs": [{"name": "prompt"}]}', r"inputs\[0\]\.shape is missing", id="no-shape"),
        pytest.param(
            b'{"inputs": [], "parameters": {"seed": null}}',
            "^parameters.seed must be one number, one text, true or false, not null.$",
            id="null-parameter",
        ),
        pytest.param(
            b'{"inputs": [], "parameters": {"target_size": [8, 8]}}',
            r"^parameters.target_size must be one number, one text, true or false, not \[8, 8\].$",
            id="list-as-parameter",
        ),
        pytest.param(
            b'{"inputs": [], "id": "' + b"x" * 1025 + b'"}', "^id must have at most 1024 characters.$", id="long-id"
        ),
        pytest.param(
            b'{"inputs": [], "outputs": [{"name": "image", "shape": [1]}]}',
            r"^outputs\[0\].shape is not a field of the protocol.$",
            id="field-of-another-object",
        ),
        pytest.param(b"\xef\xbb\xbf{}", "^The body begins with a byte order mark", id="byte-order-mark"),
    ],
)
def test_a_body_that_is_no_request_is_refused_with_a_sentence(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_infer(raw, None)


@pytest.mark.parametrize(
    ("inputs", "rest", "message"),
    [
        pytest.param([PROMPT, PROMPT], {}, "prompt is given twice", id="input-twice"),
        pytest.param([PROMPT], {"parameters": {"prompt": "x"}}, "as an input and as a parameter", id="both-ways"),
        pytest.param(
            [PROMPT], {"parameters": {"denoising_limit": 1, "high_noise_frac": 1}}, "under two names", id="two-names"
        ),
        pytest.param([{**PROMPT, "data": [7]}], {}, "must be text, not 7.$", id="number-as-text"),
        pytest.param([{**PROMPT, "data": [None]}], {}, "must be text, not null.$", id="null-as-text"),
        pytest.param([{**PROMPT, "name": "promt"}], {}, "did you mean 'prompt'", id="unknown-input"),
        pytest.param([PROMPT], {"parameters": {"steps": 3}}, "no parameter 'steps'", id="unknown-parameter"),
        pytest.param([{**PROMPT, "parameters": {"x": 1}}], {}, "not a parameter of an input", id="input-parameter"),
        pytest.param([{**PROMPT, "shape": [1, 1]}], {}, r"shape must be \[1\] or \[n\]", id="two-dimensions"),
        pytest.param([{**PROMPT, "shape": [0], "data": []}], {}, "no element", id="empty"),
        pytest.param([{**PROMPT, "datatype": "INT64", "data": [1]}], {}, "must be BYTES", id="prompt-as-number"),
        pytest.param([PROMPT, tensor("seed", "BYTES", ["1"])], {}, "number type", id="seed-as-text"),
        pytest.param([PROMPT, tensor("seed", "BOOL", [True])], {}, "number type", id="seed-as-bool"),
        pytest.param(
            [PROMPT, tensor("seed", "INT64", [1, 2])], {}, "it needs 1, as prompt has.$", id="two-seeds-one-prompt"
        ),
        pytest.param([PROMPT, tensor("seed", "FP32", [1.5])], {}, "whole number", id="half-seed"),
        pytest.param([PROMPT, tensor("seed", "INT64", [-1])], {}, "at least 0", id="negative-seed"),
        pytest.param([PROMPT, tensor("target_size", "INT64", [1])], {}, r"\[2\] or \[n, 2\]", id="half-pair"),
        pytest.param([PROMPT], {"parameters": {"target_size": "8,8"}}, "is a pair", id="pair-as-parameter"),
        pytest.param([PROMPT], {"parameters": {"prompt_2": "a\0b"}}, "NUL", id="nul"),
        pytest.param([PROMPT], {"parameters": {"seed": True}}, "whole number", id="bool-parameter"),
        pytest.param([PROMPT], {"parameters": {"timeout": -1}}, "microseconds", id="negative-timeout"),
        pytest.param([PROMPT], {"parameters": {"binary_data_output": 1}}, "true or false", id="output-flag"),
        pytest.param([PROMPT], {"parameters": {"output_format": "gif"}}, "png, jpeg, webp", id="format"),
        pytest.param([PROMPT], {"outputs": [{"name": "picture"}]}, "no output 'picture'", id="unknown-output"),
        pytest.param([PROMPT], {"outputs": [{"name": "seed"}] * 2}, "asked for twice", id="output-twice"),
        pytest.param(
            [PROMPT], {"outputs": [{"name": "seed", "parameters": {"classification": 1}}]}, "classification", id="class"
        ),
        pytest.param([{**PROMPT, "parameters": {"binary_data_size": 4}}], {}, "exactly one", id="data-and-binary"),
        pytest.param([{k: v for k, v in PROMPT.items() if k != "data"}], {}, "exactly one", id="no-data"),
        pytest.param(
            [tensor("prompt", "BYTES", ["a", "b"]), tensor("output_format", "BYTES", ["png", "webp"])],
            {},
            "the same for all",
            id="two-formats",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_sentence(
    inputs: list[dict[str, Any]], rest: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(*inputs, **rest)


@pytest.mark.parametrize("header", ["abc", "-1", "+5", " 5", "5.0", "1_0", "", "٣", "99999", "9" * 5000])
def test_a_wrong_json_length_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequest, match="Inference-Header-Content-Length"):
        parse_infer(body(PROMPT), header)


@pytest.mark.parametrize(
    ("size", "tail", "message"),
    [
        pytest.param(9, b"\5\0\0\0hello!", "1 bytes follow the data of the last input", id="bytes-left-over"),
        pytest.param(10, b"\5\0\0\0hello", "9 bytes are left", id="bytes-missing"),
        pytest.param(-1, b"", "number of bytes", id="negative"),
        pytest.param("9", b"\5\0\0\0hello", "number of bytes", id="text"),
    ],
)
def test_binary_data_that_contradicts_its_size_is_refused(size: object, tail: bytes, message: str) -> None:
    head = {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    with pytest.raises(InvalidRequest, match=message):
        binary({"inputs": [head]}, tail)


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 300).map(str), st.text(max_size=5)))
def test_any_body_becomes_a_call_or_a_sentence(raw: bytes, header: str | None) -> None:
    try:
        parse_infer(raw, header)
    except InvalidRequest as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


DATATYPES = ["BYTES", "INT64", "FP32", "UINT8", "BOOL", "x"]
INPUT = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(PARAMETERS)),
        "shape": st.lists(st.integers(-1, 4), max_size=4) | JSON,
        "datatype": st.sampled_from(DATATYPES),
    },
    optional={
        "data": JSON
        | st.lists(st.integers(0, 255), max_size=24)
        | st.lists(st.text("/+AZ09=:,", max_size=9), max_size=3),
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(0, 60) | JSON}),
    },
)
MESSAGE = st.fixed_dictionaries(
    {"inputs": st.lists(INPUT, max_size=3).map(lambda inputs: [PROMPT, *inputs])},
    optional={
        "parameters": st.dictionaries(st.sampled_from(sorted(PARAMETERS)), JSON, max_size=3),
        "id": JSON,
        "outputs": JSON,
    },
)


@given(MESSAGE, st.binary(max_size=60), st.booleans())
def test_any_message_becomes_a_call_or_a_sentence(document: dict[str, Any], tail: bytes, behind: bool) -> None:
    raw = json.dumps(document).encode()
    try:
        call = parse_infer(raw + tail, str(len(raw))) if behind else parse_infer(raw, None)
    except InvalidRequest as error:
        assert str(error).encode() and len(str(error)) < 600
        return
    for request in call.requests:
        for picture in (request.image, request.mask_image):
            if isinstance(picture, Pixels):
                assert len(picture.data) == picture.height * picture.width * picture.channels > 0


# --- Images, lists, truths and adapters ------------------------------------------------------------------------

FILE = b"\x89PNG\r\n\x1a\n and what follows"
TEXT = base64.b64encode(FILE).decode()


def binary_input(name: str, datatype: str, shape: list[int], data: bytes) -> InferCall:
    sized = {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
    return binary({"inputs": [PROMPT, sized]}, data)


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_a_file_is_base64_in_json_and_itself_in_binary(name: str) -> None:
    broken = "\n".join(TEXT[i : i + 10] for i in range(0, len(TEXT), 10))
    for text in (TEXT, broken, f" {TEXT}\t", f"data:image/png;base64,{TEXT}", f"DATA:image/webp;x=y;BASE64,{TEXT}"):
        assert getattr(parse(PROMPT, tensor(name, "BYTES", [text])).requests[0], name) == FILE
    assert getattr(binary_input(name, "BYTES", [1], write_strings([FILE])).requests[0], name) == FILE


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("image", [2, 1, 3], [Pixels(bytes(range(6)), 2, 1)]),
        ("image", [2, 1, 1, 3], [Pixels(bytes(range(3)), 1, 1), Pixels(bytes(range(3, 6)), 1, 1)]),
        ("mask_image", [2, 5], [Pixels(bytes(range(10)), 2, 5, 1)]),
        ("mask_image", [2, 2, 2], [Pixels(bytes(range(4)), 2, 2, 1), Pixels(bytes(range(4, 8)), 2, 2, 1)]),
    ],
)
def test_pixels_are_numbers_in_json_flat_or_nested_and_bytes_in_binary(
    name: str, shape: list[int], expected: list[Pixels]
) -> None:
    count = int(np.prod(shape))
    prompts = tensor("prompt", "BYTES", ["a"] * len(expected))
    nested = np.arange(count).reshape(shape).tolist()
    for data in (list(range(count)), nested):
        call = parse(prompts, tensor(name, "UINT8", data, shape))
        assert [getattr(request, name) for request in call.requests] == expected
    sized = {"name": name, "shape": shape, "datatype": "UINT8", "parameters": {"binary_data_size": count}}
    call = binary({"inputs": [prompts, sized]}, bytes(range(count)))
    assert [getattr(request, name) for request in call.requests] == expected


def test_one_image_serves_all_prompts() -> None:
    call = parse(tensor("prompt", "BYTES", ["a", "b"]), tensor("image", "BYTES", [TEXT]))
    assert [request.image for request in call.requests] == [FILE, FILE]
    assert [request.task.value for request in call.requests] == ["image-to-image"] * 2


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "data", "message"),
    [
        ("image", "BYTES", [1], ["http://169.254.169.254/"], "addresses and file names are not read"),
        ("image", "BYTES", [1], ["/etc/passwd"], "addresses and file names are not read"),
        ("image", "BYTES", [1], [TEXT.rstrip("=")[:-1]], "must be a file's bytes"),
        ("image", "BYTES", [1], [TEXT.replace("+", "-").replace("/", "_") + "_"], "must be a file's bytes"),
        ("image", "BYTES", [1], ["é"], "must be a file's bytes"),
        ("image", "BYTES", [1], ["data:image/png,abcd"], "a data URL without ';base64,'"),
        ("image", "BYTES", [1], ["data:image/png;base64"], "a data URL without ';base64,'"),
        ("image", "BYTES", [1, 1], [TEXT], r"shape must be \[1\] or \[n\]"),
        ("image", "FP32", [1, 1, 3], [0.0, 0.5, 1.0], "must be BYTES or UINT8, not FP32"),
        ("image", "UINT8", [3], [1, 2, 3], r"\[h, w, 3\] or \[n, h, w, 3\]"),
        ("image", "UINT8", [1, 2], [1, 2], r"\[h, w, 3\]"),
        ("image", "UINT8", [1, 1, 4], [1, 2, 3, 4], r"\[h, w, 3\]"),
        ("image", "UINT8", [3, 1, 1], [1, 2, 3], r"\[h, w, 3\]"),
        ("image", "UINT8", [1, 1, 1, 1, 3], [1, 2, 3], r"\[h, w, 3\]"),
        ("image", "UINT8", [0, 1, 3], [], "no element"),
        ("image", "UINT8", [-1, 1, 3], [], "negative"),
        ("image", "UINT8", [], [1], r"\[h, w, 3\]"),
        ("image", "UINT8", [1, 1, 3], [0, 0, 256], "does not fit UINT8"),
        ("image", "UINT8", [1, 1, 3], [0, 0, True], "must be numbers"),
        ("image", "UINT8", [1, 1, 3], [0, 0], "needs 3 elements"),
        ("image", "UINT8", [2, 1, 1, 3], [0] * 6, "image has 2 values"),
        ("image", "UINT8", [4096, 4096, 3], [0], "at most 3145728 elements"),
        ("image", "UINT8", [2**30, 2**30, 3], [0], "more elements than a request"),
        ("mask_image", "UINT8", [4], [0] * 4, r"\[h, w\] or \[n, h, w\]"),
        ("mask_image", "UINT8", [2, 2, 3], [0] * 12, r"\[h, w\] or \[n, h, w\]"),
        ("mask_image", "UINT8", [2, 2, 1], [0] * 4, r"\[h, w\] or \[n, h, w\]"),
        ("mask_image", "BOOL", [2, 2], [True] * 4, "must be BYTES or UINT8, not BOOL"),
        ("timesteps", "INT64", [2], [10**4000, 7.0], "does not fit INT64"),
        ("use_karras_sigmas", "BOOL", [1], ["true"], "true or false"),
        ("use_karras_sigmas", "INT64", [1], [1], "must be BOOL, not INT64"),
        ("use_karras_sigmas", "BOOL", [2], [True, False], "it needs 1"),
        ("timesteps", "INT64", [0], [], "no element"),
        ("timesteps", "BYTES", [1], ["999"], "number type"),
        ("timesteps", "INT64", [1, 1, 1], [999], r"\[k\] or \[n, k\]"),
        ("timesteps", "INT64", [2, 1], [999, 998], "timesteps has 2 values"),
        ("sigmas", "FP32", [1], [-0.5], "at least 0"),
        ("sigmas", "INT64", [1001], list(range(1001, 0, -1)), "1 to 1000 numbers"),
        ("loras", "BYTES", [1], ["a:b"], "not a number"),
        ("loras", "BYTES", [1], ["a:1_0"], "not a number"),
        ("loras", "BYTES", [1], ["a:nan"], "not a number"),
        ("loras", "BYTES", [1], ["a:1e999"], "finite"),
        ("loras", "BYTES", [1], ["a:11"], "at most 10"),
        ("loras", "BYTES", [1], ["a, a"], "twice"),
        ("loras", "BYTES", [1], [": 1"], "must be names such as"),
        ("loras", "BYTES", [1], ["a\0"], "NUL"),
        ("loras", "BYTES", [2], ["a", "b"], "go into one text"),
        ("loras", "INT64", [1], [1], "must be BYTES"),
    ],
)
def test_what_the_newer_inputs_cannot_be_is_refused_with_a_sentence(
    name: str, datatype: str, shape: list[int], data: list[Any], message: str
) -> None:
    sent = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    with pytest.raises(InvalidRequest, match=message):
        parse(PROMPT, sent)


def test_binary_pixels_must_be_exactly_those_of_the_shape() -> None:
    for size in (0, 11, 13):
        with pytest.raises(InvalidRequest, match=rf"needs 12 bytes, got {size}"):
            binary_input("image", "UINT8", [2, 2, 3], bytes(size))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" , ", ()),
        ("a", (("a", 1.0),)),
        ("a:0.5", (("a", 0.5),)),
        (" a : -.5 , b-2.x:1e-1", (("a", -0.5), ("b-2.x", 0.1))),
        ("org/a:0", (("org/a", 0.0),)),
    ],
)
def test_adapters_are_names_with_scales(text: str, expected: tuple[tuple[str, float], ...]) -> None:
    assert parse(PROMPT, parameters={"loras": text}).requests[0].loras == expected
    assert binary_input("loras", "BYTES", [1], write_strings([text.encode()])).requests[0].loras == expected


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.7, 0.9, 0.999])
def test_a_fraction_is_the_same_in_whatever_type_it_comes(strength: float) -> None:
    # As near as the type comes to it would be less than 7 of 10 steps.
    near = float(np.float32(strength))
    calls = [
        parse(PROMPT, parameters={"strength": strength}),
        parse(PROMPT, tensor("strength", "FP64", [strength])),
        parse(PROMPT, tensor("strength", "FP32", [strength])),
        parse(PROMPT, tensor("strength", "FP32", [near])),
        binary_input("strength", "FP64", [1], struct.pack("<d", strength)),
        binary_input("strength", "FP32", [1], struct.pack("<f", strength)),
        binary_input("strength", "FP16", [1], struct.pack("<e", strength)),
    ]
    assert {call.requests[0].strength for call in calls} == {strength}


def test_a_whole_number_is_what_it_is_in_whatever_type_it_comes() -> None:
    assert parse(PROMPT, tensor("seed", "FP32", [16_777_217])).requests[0].seed == 16_777_217
    assert binary_input("seed", "FP32", [1], struct.pack("<f", 123_456_792)).requests[0].seed == 123_456_792
    assert binary_input("seed", "FP64", [1], struct.pack("<d", 2.0**62)).requests[0].seed == 2**62


def test_truths_and_lists_come_in_binary_too() -> None:
    assert binary_input("use_karras_sigmas", "BOOL", [1], b"\1").requests[0].use_karras_sigmas is True
    assert binary_input("timesteps", "INT64", [2], struct.pack("<2q", 900, 1)).requests[0].timesteps == (900.0, 1.0)
    assert binary_input("sigmas", "FP32", [2], struct.pack("<2f", 2, 0.5)).requests[0].sigmas == (2.0, 0.5)
    with pytest.raises(InvalidRequest, match="NaN or infinity"):
        binary_input("sigmas", "FP32", [1], struct.pack("<f", float("nan")))


def test_a_body_of_millions_of_numbers_is_refused_before_it_is_read() -> None:
    raw = body(PROMPT)[:-2] + b', {"name": "image", "shape": [1], "datatype": "UINT8", "data": ['
    with pytest.raises(InvalidRequest, match="too many values; send large tensors as binary data"):
        parse_infer(raw + b"0," * 5_000_000 + b"0]}]}", None)
    # A file of the same size is one value.
    large = tensor("image", "BYTES", ["A" * 10_000_000])
    image = parse(PROMPT, large).requests[0].image
    assert isinstance(image, bytes) and len(image) == 7_500_000


@pytest.mark.parametrize("part", ["[],", "{},", "[[[]]],"])
def test_a_body_of_millions_of_lists_is_refused_before_it_is_read(part: str) -> None:
    raw = b'{"inputs": [' + part.encode() * 1_200_000 + b"1]}"
    with pytest.raises(InvalidRequest, match="too many values; send large tensors as binary data"):
        parse_infer(raw, None)


def test_a_picture_of_a_million_pixels_may_come_as_lists_of_lists_of_lists() -> None:
    row = ",".join(["[1,2,3]"] * 1024)
    image = body({**tensor("image", "UINT8", [0]), "shape": [1024, 1024, 3]}, PROMPT)
    pixels = parse_infer(image.replace(b"[0]", f"[{','.join([f'[{row}]'] * 1024)}]".encode()), None).requests[0].image
    assert isinstance(pixels, Pixels) and pixels.data == bytes([1, 2, 3]) * 1024 * 1024


def test_more_inputs_or_outputs_than_there_could_be_are_not_read_one_by_one() -> None:
    with pytest.raises(InvalidRequest, match="inputs must have at most 256 members"):
        parse(*[PROMPT] * 257)
    with pytest.raises(InvalidRequest, match="outputs must have at most 256 members"):
        parse(PROMPT, outputs=[{"name": "image"}] * 257)


def test_python_does_not_search_for_garbage_among_lists_that_are_being_read() -> None:
    searches: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        searches.append(phase)

    gc.callbacks.append(note)
    try:
        parse_json(b"[" + b"[1]," * 100_000 + b"1]")
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
    assert searches.count("start") < 5


def test_pixels_need_one_size_and_binary_form_when_they_are_many() -> None:
    small, large = (GenerateRequest(prompt="p", height=side, width=side) for side in (64, 2048))
    in_json, in_binary = (
        parse(PROMPT, outputs=[{"name": "pixels", "parameters": {"binary_data": binary}}]) for binary in (False, True)
    )
    for call, request in ((in_json, small), (in_binary, large), (parse(PROMPT), large)):
        check_pixels(call, [request])
    with pytest.raises(InvalidRequest, match="one size"):
        check_pixels(in_binary, [small, large])
    with pytest.raises(InvalidRequest, match="12582912 numbers; ask for it as binary data"):
        check_pixels(in_json, [large])


# --- Writing ---------------------------------------------------------------------------------------------------


def generation(*seeds: int) -> Generation:
    request = GenerateRequest(
        prompt="a cat", height=2, width=3, num_inference_steps=4, guidance_scale=5.0, target_size=(2, 3), seed=seeds[0]
    )
    images = tuple(
        GeneratedImage(request, seed, Pixels(bytes(range(18)), 2, 3), f"png of {seed}".encode()) for seed in seeds
    )
    return Generation(images, Timings(0.1, 0.2, 0.3, 0.4), ("Mind the gap.",), ("fp8", "guidance_end"))


def test_json_answers_hold_base64_pictures_and_say_what_was_defaulted() -> None:
    raw, length = write_infer(parse(PROMPT, id="x", parameters={"guidance_scale": 5}), generation(3, 4), "sdxl", None)
    assert length is None
    answer = json.loads(raw)
    assert answer["model_name"] == "sdxl" and answer["id"] == "x" and "model_version" not in answer
    image, seed = answer["outputs"]
    assert (image["name"], image["shape"], image["datatype"]) == ("image", [2], "BYTES")
    assert [base64.b64decode(text) for text in image["data"]] == [b"png of 3", b"png of 4"]
    assert seed == {"name": "seed", "shape": [2], "datatype": "INT64", "data": [3, 4]}
    parameters = answer["parameters"]
    assert parameters["num_inference_steps"] == 4 and parameters["target_size"] == "[2, 3]"
    assert not {"prompt", "guidance_scale", "seed"} & set(parameters)
    assert [parameters[f"{stage}_seconds"] for stage in ("queue", "denoise", "decode", "encode")] == [
        0.1,
        0.2,
        0.3,
        0.4,
    ]
    assert parameters["content_type"] == "image/png" and parameters["warnings"] == "Mind the gap."
    assert parameters["lossy"] == "fp8, guidance_end"
    assert b"null" not in raw


def test_a_default_that_differs_between_pictures_is_told_for_each_of_them() -> None:
    images = tuple(
        GeneratedImage(
            GenerateRequest(prompt="p", height=8, width=width, target_size=(8, width)), 3, Pixels(b"", 8, 8), b""
        )
        for width in (8, 16, 16)
    )
    call = parse(PROMPT, tensor("width", "INT64", [8]))
    raw, _ = write_infer(call, Generation(images, Timings(0, 0, 0, 0)), "sdxl", None)
    parameters = json.loads(raw)["parameters"]
    assert parameters["target_size"] == "[[8, 8], [8, 16], [8, 16]]" and parameters["height"] == 8


def test_binary_answers_follow_their_json_in_the_order_of_the_outputs() -> None:
    call = parse(
        PROMPT,
        outputs=[
            {"name": "pixels", "parameters": {"binary_data": True}},
            {"name": "seed"},
            {"name": "image", "parameters": {"binary_data": True}},
        ],
    )
    raw, length = write_infer(call, generation(3), "sdxl", "1")
    assert length is not None
    answer = json.loads(raw[:length])
    assert answer["model_version"] == "1" and "id" not in answer
    pixels, seed, image = answer["outputs"]
    assert pixels["shape"] == [1, 2, 3, 3] and "data" not in pixels
    size = pixels["parameters"]["binary_data_size"]
    assert raw[length : length + size] == bytes(range(18))
    assert seed["data"] == [3]
    assert raw[length + size :] == write_strings([b"png of 3"])
    assert image["parameters"]["binary_data_size"] == len(raw) - length - size


def test_pixels_in_json_are_flat_numbers() -> None:
    raw, _ = write_infer(parse(PROMPT, outputs=[{"name": "pixels"}]), generation(1, 2), "sdxl", None)
    (pixels,) = json.loads(raw)["outputs"]
    assert pixels["shape"] == [2, 2, 3, 3]
    assert np.array(pixels["data"], np.uint8).tobytes() == bytes(range(18)) * 2


# --- Metadata --------------------------------------------------------------------------------------------------


def test_metadata_lists_every_input_and_output_and_no_null() -> None:
    metadata = model_metadata("sdxl", PARAMETERS)
    assert [tensor.name for tensor in metadata.inputs] == list(PARAMETERS)
    assert [tensor.name for tensor in metadata.outputs] == ["image", "seed", "pixels"]
    assert "null" not in metadata.model_dump_json()
    assert [tensor.name for tensor in model_metadata("flux", {"prompt", "seed"}).inputs] == ["prompt", "seed"]
    assert server_metadata("1.0").extensions[0] == "binary_tensor_data"
