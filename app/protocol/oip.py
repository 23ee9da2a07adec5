"""Open Inference Protocol v2: its messages, the model's metadata, and pictures to the bytes of an answer.

Pure functions and plain messages: no clock, no environment, no await; nothing here knows HTTP or a model. Requests are
read in `infer_request.py`.

Source: KServe ``open-inference-protocol`` (REST) and Triton ``extension_binary_data.md``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from app.errors import InvalidRequest
from app.generation import (
    PARAMETERS,
    GeneratedImage,
    GenerateRequest,
    Generation,
    Kind,
    PreviewWish,
)
from app.protocol import tensors

SERVER_NAME = "sdxl-runtime"
EXTENSIONS = ("binary_tensor_data", "parameters")
PLATFORM = "diffusers"
MODEL_VERSION = "1"
OUTPUTS = {"image": "BYTES", "seed": "INT64", "pixels": "UINT8"}
DEFAULT_OUTPUTS = ("image", "seed")
MAX_ID_LENGTH = 1024
MAX_TENSORS = 256
"""Inputs or outputs of one message; no message needs as many, and a million would hold up everybody else."""
MAX_JSON_PIXELS = 4_194_304
"""Numbers of the output ``pixels`` in JSON; writing more would hold up everybody else."""

T = TypeVar("T")
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to its first mistake: a million complaints would cost a gigabyte."""
Tensors = Annotated[list[T], Field(fail_fast=True, max_length=MAX_TENSORS)]


# --- Messages --------------------------------------------------------------------------------------------------


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RequestInput(_Message):
    """One input tensor; exactly one of ``data`` and the parameter ``binary_data_size`` says where its elements are."""

    name: StrictStr
    shape: Items[StrictInt]
    datatype: StrictStr
    parameters: dict[str, Scalar] | None = None
    data: list[Any] | None = None


class RequestOutput(_Message):
    name: StrictStr
    parameters: dict[str, Scalar] | None = None


class InferenceRequest(_Message):
    """The body of an infer call. KServe's client repeats the URL's ``model_name`` in it; the URL decides."""

    model_name: StrictStr | None = None
    id: Annotated[StrictStr, Field(max_length=MAX_ID_LENGTH)] | None = None
    parameters: dict[str, Scalar] | None = None
    inputs: Tensors[RequestInput]
    outputs: Tensors[RequestOutput] | None = None


class ResponseOutput(_Message):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferenceResponse(_Message):
    model_name: str
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[ResponseOutput]


class MetadataTensor(_Message):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Message):
    name: str
    versions: list[str]
    platform: str
    inputs: list[MetadataTensor]
    outputs: list[MetadataTensor]


class ServerMetadata(_Message):
    name: str
    version: str
    extensions: list[str]


class ErrorMessage(_Message):
    error: str


# --- Calls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferCall:
    """One infer call: what to generate and how to answer."""

    id: str | None
    requests: tuple[GenerateRequest, ...]
    given: frozenset[str]
    """Names of the parameters that the caller gave; all others were defaulted."""
    outputs: tuple[RequestedOutput, ...]
    timeout: float | None
    """Seconds."""
    priority: int | None = None
    """1 comes first, 9 last."""
    preview: PreviewWish | None = None
    """Wanted from a stream."""

    def without_requests(self) -> InferCall:
        """What the answer needs of it."""
        return replace(self, requests=())


def check_pixels(call: InferCall, requests: Sequence[GenerateRequest]) -> None:
    """Refuse an output ``pixels`` that could not be written.

    Args:
        call: what was asked.
        requests: the call's, resolved.

    Raises:
        InvalidRequest: pictures of several sizes, or more numbers than JSON is good for.
    """
    for output in call.outputs:
        if output.name != "pixels":
            continue
        if len({(request.height, request.width) for request in requests}) > 1:
            raise InvalidRequest("The output pixels needs pictures of one size; leave it out or ask for one size.")
        numbers = sum(3 * (r.height or 0) * (r.width or 0) * r.num_images_per_prompt for r in requests)
        if not output.binary and numbers > MAX_JSON_PIXELS:
            raise InvalidRequest(
                f"The output pixels would be {numbers} numbers; ask for it as binary data above {MAX_JSON_PIXELS}."
            )


# --- Writing ---------------------------------------------------------------------------------------------------


def write_infer(
    call: InferCall, generation: Generation, model_name: str, model_version: str | None
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON where tensors' bytes follow it.

    Args:
        call: what was asked.
        generation: its pictures.
        model_name: as in the URL.
        model_version: as in the URL, or ``None`` where it names none.
    """
    binary: list[bytes] = []
    outputs = []
    for choice in call.outputs:
        shape, values = _OUTPUT_VALUES[choice.name](generation.images)
        output: dict[str, Any] = {"name": choice.name, "shape": shape, "datatype": OUTPUTS[choice.name]}
        if choice.binary:
            raw = values.tobytes() if isinstance(values, np.ndarray) else tensors.write_strings(values)
            output["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        elif isinstance(values, np.ndarray):
            output["data"] = values.ravel().tolist()
        else:
            output["data"] = [base64.b64encode(value).decode("ascii") for value in values]
        outputs.append(output)
    message: dict[str, Any] = {"model_name": model_name}
    if model_version is not None:
        message["model_version"] = model_version
    if call.id is not None:
        message["id"] = call.id
    message["parameters"] = _response_parameters(call, generation)
    message["outputs"] = outputs
    head = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return head + b"".join(binary), len(head) if binary else None


def _encoded(images: Sequence[GeneratedImage]) -> tuple[list[int], list[bytes]]:
    return [len(images)], [image.encoded for image in images]


def _seeds(images: Sequence[GeneratedImage]) -> tuple[list[int], np.ndarray]:
    return [len(images)], np.array([image.seed for image in images], dtype="<i8")


def _pixels(images: Sequence[GeneratedImage]) -> tuple[list[int], np.ndarray]:
    height, width = images[0].pixels.height, images[0].pixels.width
    data = b"".join(image.pixels.data for image in images)
    shape = [len(images), height, width, 3]
    return shape, np.frombuffer(data, dtype=np.uint8).reshape(shape)


_OUTPUT_VALUES: dict[str, Callable[[Sequence[GeneratedImage]], tuple[list[int], Any]]] = {
    "image": _encoded,
    "seed": _seeds,
    "pixels": _pixels,
}


def _response_parameters(call: InferCall, generation: Generation) -> dict[str, Scalar]:
    """What was defaulted, and where the time went; only scalars, as the protocol wants it.

    A default that depends on the prompt's other parameters, such as the size conditioning on height and width, is a
    JSON list with one value for each picture where they differ.
    """
    requests = [image.request for image in generation.images]
    parameters: dict[str, Scalar] = {"content_type": requests[0].output_format.media_type}
    for field in dataclasses.fields(GenerateRequest):
        values = [getattr(request, field.name) for request in requests]
        value = values[0]
        if field.name in call.given or field.name == "seed" or value is None:
            continue
        if any(other != value for other in values):
            value = json.dumps(values)
        elif isinstance(value, tuple):
            value = json.dumps(value)
        parameters[field.name] = value
    timings = generation.timings
    for stage in ("queue", "denoise", "decode", "encode"):
        parameters[f"{stage}_seconds"] = round(getattr(timings, stage), 6)
    if generation.warnings:
        parameters["warnings"] = " ".join(generation.warnings)
    if generation.lossy:
        parameters["lossy"] = ", ".join(generation.lossy)
    return parameters


# --- Metadata --------------------------------------------------------------------------------------------------

DATATYPES = {
    Kind.TEXT: "BYTES",
    Kind.INTEGER: "INT64",
    Kind.NUMBER: "FP32",
    Kind.BOOLEAN: "BOOL",
    Kind.PAIR: "INT64",
    Kind.LIST: "FP32",
    Kind.ADAPTERS: "BYTES",
    Kind.IMAGE: "BYTES",
}
"""What metadata and documentation name; numbers are read from any type that holds them exactly."""


def model_metadata(name: str, taken: Collection[str]) -> ModelMetadata:
    """Inputs and outputs of the model; -1 stands for a size that the caller chooses.

    Only ``prompt`` is required.

    Args:
        name: of the model.
        taken: names of the parameters that it takes.
    """
    inputs = [
        MetadataTensor(
            name=parameter.name,
            datatype=DATATYPES[parameter.kind],
            shape=[-1, 2] if parameter.kind is Kind.PAIR else [-1],
        )
        for parameter in PARAMETERS.values()
        if parameter.name in taken
    ]
    outputs = [
        MetadataTensor(name=output, datatype=datatype, shape=[-1, -1, -1, 3] if output == "pixels" else [-1])
        for output, datatype in OUTPUTS.items()
    ]
    return ModelMetadata(name=name, versions=[MODEL_VERSION], platform=PLATFORM, inputs=inputs, outputs=outputs)


def server_metadata(version: str) -> ServerMetadata:
    return ServerMetadata(name=SERVER_NAME, version=version, extensions=list(EXTENSIONS))
