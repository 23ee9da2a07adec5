"""The body of an infer call, from bytes to `GenerateRequest`.

Pure functions, which raise `InvalidRequest` and nothing else, whatever the bytes are.

Source: KServe ``open-inference-protocol`` (REST) and Triton ``extension_binary_data.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from app.errors import InvalidRequest
from app.generation import (
    MAX_PRIORITY,
    PARAMETERS,
    GenerateRequest,
    Kind,
    Parameter,
    Pixels,
    PreviewKind,
    PreviewWish,
)
from app.parameters import ALIASES, parse_parameter
from app.protocol import tensors
from app.protocol.oip import (
    DEFAULT_OUTPUTS,
    OUTPUTS,
    InferCall,
    InferenceRequest,
    RequestedOutput,
    RequestInput,
    RequestOutput,
    Scalar,
)
from app.protocol.strict_json import describe_validation, parse_json
from app.protocol.values import MAX_JSON_NUMBERS, check_text, picture_shape, read_image_file, split_pictures
from app.sentences import describe, nearest

MAX_ELEMENTS = 8192
"""Elements of one input; refused before work is done for each of them."""


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
    options = parse_options(_take_parameters(message, values))
    return InferCall(
        id=message.id,
        requests=_requests(values),
        given=frozenset(values),
        outputs=_requested_outputs(message, options.binary),
        timeout=options.timeout,
        priority=options.priority,
        preview=options.preview,
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
    values: dict[str, list[object]] = {"prompt": [parse_parameter("prompt", check_text("prompt", body))]}
    outputs = tuple(RequestedOutput(name, binary=True) for name in DEFAULT_OUTPUTS)
    return InferCall(None, _requests(values), frozenset(values), outputs, None)


def _parse_message(raw: bytes) -> InferenceRequest:
    document = parse_json(raw)
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object with a list of inputs.")
    try:
        return InferenceRequest.model_validate(document)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error, _FIELDS)) from None


_FIELDS = {*InferenceRequest.model_fields, *RequestInput.model_fields, *RequestOutput.model_fields}


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
                        f"binary_data_size is {describe(size)}, but {len(tail) - position} bytes are left."
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
        raise InvalidRequest(f"There is no input {describe(name)}{nearest(name, PARAMETERS)}.")
    if parameter.name in values:
        raise InvalidRequest(f"Input {parameter.name} is given twice.")
    return parameter


def _binary_size(tensor: RequestInput) -> int | None:
    parameters = dict(tensor.parameters or {})
    size = parameters.pop("binary_data_size", None)
    if parameters:
        raise InvalidRequest(f"{describe(next(iter(parameters)))} is not a parameter of an input.")
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
    flat = _read_elements(tensor, raw, MAX_ELEMENTS)
    if not flat:
        raise InvalidRequest("it has no element.")
    return [parse_parameter(parameter.name, value) for value in _grouped(parameter, tensor.shape, flat)]


_DATATYPE_OF_KIND = {Kind.TEXT: "BYTES", Kind.ADAPTERS: "BYTES", Kind.IMAGE: "BYTES", Kind.BOOLEAN: "BOOL"}
"""All other kinds are numbers of whatever type holds them exactly."""


def _read_elements(tensor: RequestInput, raw: memoryview | None, most: int) -> list[tensors.Value]:
    count = tensors.element_count(tensor.shape)
    if count > most:
        raise InvalidRequest(f"it may have at most {most} elements, not {count}.")
    if raw is None:
        return tensors.read_json(tensor.data, tensor.datatype, tensor.shape)
    return tensors.read_binary(raw, tensor.datatype, tensor.shape)


def _grouped(parameter: Parameter, shape: Sequence[int], flat: Sequence[tensors.Value]) -> list[object]:
    """Elements put together to values: pairs and lists take a row each, everything else is one element."""
    if parameter.kind in (Kind.PAIR, Kind.LIST):
        wanted = "[2] or [n, 2]" if parameter.kind is Kind.PAIR else "[k] or [n, k]"
        if len(shape) not in (1, 2) or (parameter.kind is Kind.PAIR and shape[-1] != 2):
            raise InvalidRequest(f"shape must be {wanted}, not {describe(list(shape))}.")
        return [tuple(flat[i : i + shape[-1]]) for i in range(0, len(flat), shape[-1])]
    if len(shape) != 1:
        raise InvalidRequest(f"shape must be [1] or [n], not {describe(list(shape))}.")
    if parameter.kind is Kind.IMAGE:
        return [read_image_file(parameter.name, value) for value in flat]
    return [check_text(parameter.name, value) for value in flat]


def _read_pixels(parameter: Parameter, tensor: RequestInput, raw: memoryview | None) -> list[Pixels]:
    count = tensors.element_count(tensor.shape)
    pictures = picture_shape(parameter.name, tensor.shape)
    if raw is None:
        data = bytes(_read_elements(tensor, raw, MAX_JSON_NUMBERS))  # type: ignore[arg-type]
    elif len(raw) != count:
        raise InvalidRequest(f"UINT8 data of shape {describe(tensor.shape)} needs {count} bytes, got {len(raw)}.")
    else:
        data = bytes(raw)
    return split_pictures(data, *pictures)


OPTIONS = ("binary_data_output", "timeout", "priority", "preview", "preview_every")
"""Request parameters that say how to answer, and when."""


def _take_parameters(message: InferenceRequest, values: dict[str, list[object]]) -> dict[str, Scalar]:
    """Move scalars given as request parameters into `values`; what is left steers the answer."""
    options: dict[str, Scalar] = {}
    moved: set[str] = set()
    for name, value in (message.parameters or {}).items():
        if name in OPTIONS:
            options[name] = value
            continue
        parameter = PARAMETERS.get(ALIASES.get(name, name))
        if parameter is None:
            known = [*PARAMETERS, *OPTIONS]
            raise InvalidRequest(f"There is no parameter {describe(name)}{nearest(name, known)}.")
        if parameter.name in values:
            ways = "under two names" if parameter.name in moved else "as an input and as a parameter"
            raise InvalidRequest(f"{parameter.name} is given twice, {ways}.")
        if parameter.kind in _TENSORS_ONLY:
            raise InvalidRequest(f"{parameter.name} {_TENSORS_ONLY[parameter.kind]}.")
        values[parameter.name] = [parse_parameter(parameter.name, check_text(parameter.name, value))]
        moved.add(parameter.name)
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
            hint = " Several adapters for one prompt go into one text, with commas." if name == "loras" else ""
            needed = f"1, or {count} as prompt has" if count > 1 else "1, as prompt has"
            raise InvalidRequest(f"{name} has {len(column)} values; it needs {needed}.{hint}")
    if len(set(values.get("output_format", ()))) > 1:
        raise InvalidRequest("output_format must be the same for all prompts of a request.")
    rows = [{name: column[i if len(column) == count else 0] for name, column in values.items()} for i in range(count)]
    return tuple(GenerateRequest(**row) for row in rows)  # type: ignore[arg-type]


def _requested_outputs(message: InferenceRequest, default: bool) -> tuple[RequestedOutput, ...]:
    if not message.outputs:
        return tuple(RequestedOutput(name, default) for name in DEFAULT_OUTPUTS)
    chosen: dict[str, RequestedOutput] = {}
    for output in message.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"There is no output {describe(output.name)}{nearest(output.name, OUTPUTS)}.")
        if output.name in chosen:
            raise InvalidRequest(f"Output {output.name} is asked for twice.")
        parameters = dict(output.parameters or {})
        binary = _boolean("binary_data", parameters.pop("binary_data", default))
        if parameters:
            raise InvalidRequest(f"{describe(next(iter(parameters)))} is not a parameter of an output.")
        chosen[output.name] = RequestedOutput(output.name, binary)
    return tuple(chosen.values())


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {describe(value)}.")
    return value


@dataclass(frozen=True, slots=True)
class Options:
    """How to answer, and when; see `InferCall`."""

    binary: bool
    timeout: float | None
    priority: int | None
    preview: PreviewWish | None


def parse_options(options: Mapping[str, object]) -> Options:
    """Read the request parameters of `OPTIONS`.

    Raises:
        InvalidRequest: with one sentence that says what to change.
    """
    binary = _boolean("binary_data_output", options.get("binary_data_output", False))
    return Options(binary, _timeout(options), _priority(options), _preview(options))


def _timeout(options: Mapping[str, object]) -> float | None:
    # Triton reads 0 as "no timeout of mine".
    value = _whole("timeout", options, 0, 2**63 - 1, "a whole number of microseconds")
    return value / 1e6 if value else None


def _priority(options: Mapping[str, object]) -> int | None:
    """As Triton has it: 1 is the most urgent level, and 0 means the default one.

    Source: Triton ``extension_schedule_policy.md``.
    """
    what = f"a whole number from 1, the most urgent, to {MAX_PRIORITY}"
    return _whole("priority", options, 0, MAX_PRIORITY, what) or None


def _preview(options: Mapping[str, object]) -> PreviewWish | None:
    every = _whole("preview_every", options, 1, 1000, "a whole number of steps from 1 to 1000")
    kind = options.get("preview", "none")
    kinds = ("none", *PreviewKind)
    if not isinstance(kind, str) or kind not in kinds:
        raise InvalidRequest(f"preview must be {', '.join(kinds[:-1])} or {kinds[-1]}, not {describe(kind)}.")
    if kind == "none":
        if every is not None:
            raise InvalidRequest("preview_every needs preview.")
        return None
    return PreviewWish(PreviewKind(kind)) if every is None else PreviewWish(PreviewKind(kind), every)


def _whole(name: str, options: Mapping[str, object], least: int, most: int, what: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    # Some clients write whole numbers with a fraction.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be {what}.")
    return value
