"""Open Inference Protocol v2 messages: bytes to `GenerateRequest` and pictures to bytes.

Pure functions and plain messages: no clock, no environment, no await; nothing here knows HTTP or a model.

Source: KServe ``open-inference-protocol`` (REST) and Triton ``extension_binary_data.md``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from app.errors import InvalidRequest
from app.generation import (
    ALIASES,
    PARAMETERS,
    GeneratedImage,
    GenerateRequest,
    Generation,
    Kind,
    Parameter,
    Pixels,
    nearest,
    parse_parameter,
)
from app.protocol import tensors

SERVER_NAME = "sdxl-runtime"
EXTENSIONS = ("binary_tensor_data", "parameters")
PLATFORM = "diffusers"
MODEL_VERSION = "1"
OUTPUTS = {"image": "BYTES", "seed": "INT64", "pixels": "UINT8"}
DEFAULT_OUTPUTS = ("image", "seed")
MAX_ID_LENGTH = 1024
MAX_NAMES = 256
"""Names in one JSON object; no message needs as many."""
MAX_ELEMENTS = 8192
"""Elements of one input; refused before work is done for each of them."""
MAX_JSON_IMAGE = 3 * 1024 * 1024
"""Numbers of an input image in JSON; larger ones come as binary data or as an encoded file."""
MAX_JSON_PIXELS = 4_194_304
"""Numbers of the output ``pixels`` in JSON; writing more would hold up everybody else."""

T = TypeVar("T")
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to its first mistake: a million complaints would cost a gigabyte."""


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
    inputs: Items[RequestInput]
    outputs: Items[RequestOutput] | None = None


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


# --- Reading ---------------------------------------------------------------------------------------------------


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


def parse_infer(body: bytes, json_length: str | None) -> InferCall:
    """Read the body of an infer call.

    Args:
        body: JSON, with the tensors' bytes behind it where there are any.
        json_length: the header ``Inference-Header-Content-Length``, the number of bytes of JSON; without it, all of
            `body` is JSON. 0 means that all of `body` is one prompt (Triton's raw binary request).

    Raises:
        InvalidRequest: with one sentence that says what to change.
    """
    length = _json_length(json_length, len(body))
    if length == 0 and json_length is not None:
        return _raw_request(body)
    message = _parse_message(body[:length])
    values = _read_inputs(message, memoryview(body)[length:])
    options = _take_parameters(message, values)
    return InferCall(
        id=message.id,
        requests=_requests(values),
        given=frozenset(values),
        outputs=_requested_outputs(message, options),
        timeout=_timeout(options),
    )


def _json_length(header: str | None, total: int) -> int:
    if header is None:
        return total
    # int() also takes signs, spaces, underscores and other scripts' digits.
    if not re.fullmatch(r"[0-9]{1,18}", header):
        raise InvalidRequest("Inference-Header-Content-Length must be the number of bytes of JSON.")
    length = int(header)
    if length > total:
        raise InvalidRequest(f"Inference-Header-Content-Length is {length}, but the body has {total} bytes.")
    return length


def _raw_request(body: bytes) -> InferCall:
    values: dict[str, list[object]] = {"prompt": [parse_parameter("prompt", _text("prompt", body))]}
    outputs = tuple(RequestedOutput(name, binary=True) for name in DEFAULT_OUTPUTS)
    return InferCall(None, _requests(values), frozenset(values), outputs, None)


def _parse_message(raw: bytes) -> InferenceRequest:
    document = parse_json(raw)
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object with a list of inputs.")
    try:
        return InferenceRequest.model_validate(document)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error, InferenceRequest)) from None


def parse_json(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no name twice in one object, no lone surrogate, no endless object.

    Raises:
        InvalidRequest: what is wrong and where.
    """
    try:
        text = raw.decode("utf-8")
        document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_names)
        if re.search(r"\\u[dD][89abAB]", text) or re.search(r"\\u[dD][c-fC-F]", text):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The JSON is not UTF-8 (byte {error.start}).") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The JSON holds half of a surrogate pair, which is no character.") from None
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError:
        # Python refuses to read integers of more than 4,300 digits.
        raise InvalidRequest("A number in the JSON has too many digits.") from None
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not JSON; numbers must be finite.")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:
        raise InvalidRequest(f"One JSON object has more than {MAX_NAMES} names.")
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{_quote(twice)} stands twice in one JSON object.")
    return result


def describe_validation(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's complaints as one sentence that names the place."""
    detail = error.errors(include_url=False)[0]
    place = ""
    for part in detail["loc"]:
        # Pydantic appends the tried type of a union, which says nothing to a caller.
        if isinstance(part, str) and part in ("bool", "int", "float", "str"):
            break
        place += f"[{part}]" if isinstance(part, int) else f"{'.' if place else ''}{_shorten(part)}"
    if detail["type"] == "extra_forbidden":
        known = {"id", "parameters", "inputs", "outputs", "name", "shape", "datatype", "data"}
        name = str(detail["loc"][-1])
        return f"{place} is not a field of the protocol{nearest(name, known & _all_fields(model))}."
    if detail["type"] == "missing":
        return f"{place} is missing."
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if detail["type"] == "model_type":
        expected = "an object"
    return f"{place} must be {expected}, not {_quote(detail['input'])}."


def _all_fields(model: type[BaseModel]) -> set[str]:
    return {*model.model_fields, *RequestInput.model_fields, *RequestOutput.model_fields}


def _read_inputs(message: InferenceRequest, tail: memoryview) -> dict[str, list[object]]:
    """Every input's values in the types of `GenerateRequest`, one for each prompt or one for all."""
    values: dict[str, list[object]] = {}
    position = 0
    for tensor in message.inputs:
        parameter = _known_input(tensor.name, values)
        try:
            size = _binary_size(tensor)
            raw = None
            if size is not None:
                if position + size > len(tail):
                    raise InvalidRequest(
                        f"binary_data_size is {_quote(size)}, but {len(tail) - position} bytes are left."
                    )
                raw = tail[position : position + size]
                position += size
            values[parameter.name] = _input_values(parameter, tensor, raw)
        except InvalidRequest as error:
            raise InvalidRequest(f"Input {parameter.name}: {error}") from None
    if position != len(tail):
        raise InvalidRequest(f"{len(tail) - position} bytes follow the data of the last input.")
    return values


def _known_input(name: str, values: Mapping[str, object]) -> Parameter:
    parameter = PARAMETERS.get(ALIASES.get(name, name))
    if parameter is None:
        raise InvalidRequest(f"There is no input {_quote(name)}{nearest(name, PARAMETERS)}.")
    if parameter.name in values:
        raise InvalidRequest(f"Input {parameter.name} is given twice.")
    return parameter


def _binary_size(tensor: RequestInput) -> int | None:
    parameters = dict(tensor.parameters or {})
    size = parameters.pop("binary_data_size", None)
    if parameters:
        raise InvalidRequest(f"{_quote(next(iter(parameters)))} is not a parameter of an input.")
    if (size is None) == (tensor.data is None):
        raise InvalidRequest("give exactly one of data and the parameter binary_data_size.")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise InvalidRequest("binary_data_size must be a number of bytes.")
    return size


def _input_values(parameter: Parameter, tensor: RequestInput, raw: memoryview | None) -> list[object]:
    """One input's values in its parameter's type: one for each prompt, or one for all of them."""
    tensors.check_datatype(tensor.datatype)
    kind = parameter.kind
    if kind is Kind.IMAGE and tensor.datatype == "UINT8":
        return [parse_parameter(parameter.name, pixels) for pixels in _read_pixels(parameter, tensor, raw)]
    expected = _DATATYPE_OF_KIND.get(kind)
    if tensor.datatype != expected and (expected or tensor.datatype in ("BYTES", "BOOL")):
        also = " or UINT8" if kind is Kind.IMAGE else ""
        wanted = f"{expected}{also}" if expected else "a number type such as INT64 or FP32"
        raise InvalidRequest(f"datatype must be {wanted}, not {tensor.datatype}.")
    flat = _read_elements(tensor, raw)
    values: list[object] = list(flat)
    if kind is Kind.PAIR:
        if tensor.shape[-1:] != [2] or len(tensor.shape) > 2:
            raise InvalidRequest(f"shape must be [2] or [n, 2], not {_quote(tensor.shape)}.")
        values = list(zip(flat[::2], flat[1::2], strict=True))
    elif len(tensor.shape) != 1:
        wanted = "[k], one list for all prompts" if kind is Kind.LIST else "[1] or [n]"
        raise InvalidRequest(f"shape must be {wanted}, not {_quote(tensor.shape)}.")
    if not values:
        raise InvalidRequest("it has no element.")
    if kind is Kind.LIST:
        values = [tuple(values)]
    elif kind is Kind.IMAGE:
        values = [_image_file(parameter.name, value) for value in values]
    elif kind in (Kind.TEXT, Kind.ADAPTERS):
        values = [_text(parameter.name, value) for value in values]
    return [parse_parameter(parameter.name, value) for value in values]


_DATATYPE_OF_KIND = {Kind.TEXT: "BYTES", Kind.ADAPTERS: "BYTES", Kind.IMAGE: "BYTES", Kind.BOOLEAN: "BOOL"}
"""All other kinds are numbers of whatever type holds them exactly."""


def _read_elements(tensor: RequestInput, raw: memoryview | None, most: int = MAX_ELEMENTS) -> list[tensors.Value]:
    count = tensors.element_count(tensor.shape)
    if count > most:
        raise InvalidRequest(f"it may have at most {most} elements, not {count}.")
    if raw is None:
        return tensors.read_json(tensor.data, tensor.datatype, tensor.shape)
    return tensors.read_binary(raw, tensor.datatype, tensor.shape)


def _image_file(name: str, value: object) -> bytes:
    """A file's bytes: as they are in binary data, as base64 text in JSON."""
    if isinstance(value, bytes):
        return value
    assert isinstance(value, str)
    # Browsers' canvases hand out data URLs; the part behind the comma is what counts.
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        raise InvalidRequest(
            f"{name} must be a file's bytes, in JSON as base64; addresses and file names are not read."
        ) from None


def _read_pixels(parameter: Parameter, tensor: RequestInput, raw: memoryview | None) -> list[Pixels]:
    """Pictures sent as numbers: ``[h, w, 3]`` or ``[n, h, w, 3]``, masks ``[h, w]`` or ``[n, h, w]``."""
    channels = 1 if parameter.name == "mask_image" else 3
    shape = tensor.shape
    sides = shape[:-1] if channels == 3 else shape
    if len(sides) not in (2, 3) or (channels == 3 and shape[-1] != 3):
        wanted = "[h, w, 3] or [n, h, w, 3]" if channels == 3 else "[h, w] or [n, h, w]"
        raise InvalidRequest(f"shape must be {wanted}, not {_quote(shape)}.")
    count = tensors.element_count(shape)
    if not count:
        raise InvalidRequest("it has no element.")
    if raw is None:
        data = bytes(_read_elements(tensor, raw, MAX_JSON_IMAGE))  # type: ignore[arg-type]
    elif len(raw) != count:
        raise InvalidRequest(f"UINT8 data of shape {_quote(shape)} needs {count} bytes, got {len(raw)}.")
    else:
        data = bytes(raw)
    height, width = sides[-2:]
    size = height * width * channels
    return [Pixels(data[i : i + size], height, width, channels) for i in range(0, count, size)]


def _text(name: str, value: object) -> object:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"{name} is not UTF-8 text.") from None
    if isinstance(value, str) and "\0" in value:
        raise InvalidRequest(f"{name} holds a NUL character.")
    return value


def _take_parameters(message: InferenceRequest, values: dict[str, list[object]]) -> dict[str, Scalar]:
    """Move scalars given as request parameters into `values`; what is left steers the answer."""
    options: dict[str, Scalar] = {}
    for name, value in (message.parameters or {}).items():
        if name in ("binary_data_output", "timeout"):
            options[name] = value
            continue
        parameter = PARAMETERS.get(ALIASES.get(name, name))
        if parameter is None:
            known = [*PARAMETERS, "binary_data_output", "timeout"]
            raise InvalidRequest(f"There is no parameter {_quote(name)}{nearest(name, known)}.")
        if parameter.name in values:
            raise InvalidRequest(f"{parameter.name} is given twice, as an input and as a parameter.")
        if parameter.kind in _TENSORS_ONLY:
            raise InvalidRequest(f"{parameter.name} {_TENSORS_ONLY[parameter.kind]}.")
        values[parameter.name] = [parse_parameter(parameter.name, _text(parameter.name, value))]
    return options


_TENSORS_ONLY = {
    Kind.PAIR: "is a pair; give it as an input of shape [2]",
    Kind.LIST: "is a list; give it as an input of shape [k]",
    Kind.IMAGE: "is an image; give it as an input",
}


def _requests(values: Mapping[str, list[object]]) -> tuple[GenerateRequest, ...]:
    if "prompt" not in values:
        raise InvalidRequest("The input prompt is missing.")
    count = len(values["prompt"])
    for name, column in values.items():
        if len(column) not in (1, count):
            raise InvalidRequest(f"{name} has {len(column)} values; it needs 1, or {count} as prompt has.")
    if len(set(values.get("output_format", ()))) > 1:
        raise InvalidRequest("output_format must be the same for all prompts of a request.")
    rows = [{name: column[i if len(column) == count else 0] for name, column in values.items()} for i in range(count)]
    return tuple(GenerateRequest(**row) for row in rows)  # type: ignore[arg-type]


def _requested_outputs(message: InferenceRequest, options: Mapping[str, Scalar]) -> tuple[RequestedOutput, ...]:
    default = _boolean("binary_data_output", options.get("binary_data_output", False))
    if not message.outputs:
        return tuple(RequestedOutput(name, default) for name in DEFAULT_OUTPUTS)
    chosen: dict[str, RequestedOutput] = {}
    for output in message.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"There is no output {_quote(output.name)}{nearest(output.name, OUTPUTS)}.")
        if output.name in chosen:
            raise InvalidRequest(f"Output {output.name} is asked for twice.")
        parameters = dict(output.parameters or {})
        binary = _boolean("binary_data", parameters.pop("binary_data", default))
        if parameters:
            raise InvalidRequest(f"{_quote(next(iter(parameters)))} is not a parameter of an output.")
        chosen[output.name] = RequestedOutput(output.name, binary)
    return tuple(chosen.values())


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {_quote(value)}.")
    return value


def _timeout(options: Mapping[str, Scalar]) -> float | None:
    value = options.get("timeout")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise InvalidRequest("timeout must be a whole number of microseconds.")
    # Triton reads 0 as "no timeout of mine".
    return value / 1e6 if value else None


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quote(value: object) -> str:
    return _shorten(repr(value))


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
    """What was defaulted, and where the time went; only scalars, as the protocol wants it."""
    request = generation.images[0].request
    parameters: dict[str, Scalar] = {"content_type": request.output_format.media_type}
    for field in dataclasses.fields(GenerateRequest):
        value = getattr(request, field.name)
        if field.name in call.given or field.name == "seed" or value is None or isinstance(value, Pixels | bytes):
            continue
        if isinstance(value, tuple):
            value = json.dumps(value)
        parameters[field.name] = value
    timings = generation.timings
    for stage in ("queue", "denoise", "decode", "encode"):
        parameters[f"{stage}_seconds"] = round(getattr(timings, stage), 6)
    if generation.warnings:
        parameters["warnings"] = " ".join(generation.warnings)
    return parameters


# --- Metadata --------------------------------------------------------------------------------------------------

_DATATYPES = {
    Kind.TEXT: "BYTES",
    Kind.INTEGER: "INT64",
    Kind.NUMBER: "FP32",
    Kind.BOOLEAN: "BOOL",
    Kind.PAIR: "INT64",
    Kind.LIST: "FP32",
    Kind.ADAPTERS: "BYTES",
    Kind.IMAGE: "BYTES",
}


def model_metadata(name: str) -> ModelMetadata:
    """Inputs and outputs of the model; -1 stands for a size that the caller chooses.

    Only ``prompt`` is required.
    """
    inputs = [
        MetadataTensor(
            name=parameter.name,
            datatype=_DATATYPES[parameter.kind],
            shape=[-1, 2] if parameter.kind is Kind.PAIR else [-1],
        )
        for parameter in PARAMETERS.values()
    ]
    outputs = [
        MetadataTensor(name=output, datatype=datatype, shape=[-1, -1, -1, 3] if output == "pixels" else [-1])
        for output, datatype in OUTPUTS.items()
    ]
    return ModelMetadata(name=name, versions=[MODEL_VERSION], platform=PLATFORM, inputs=inputs, outputs=outputs)


def server_metadata(version: str) -> ServerMetadata:
    return ServerMetadata(name=SERVER_NAME, version=version, extensions=list(EXTENSIONS))
