"""What an infer request may say, as JSON Schema and in examples: one prompt and every parameter.

The protocol lets a value be sent in many ways. This is the plainest of them, and strict: whatever follows it is served.
Nothing here knows OpenAPI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from app.engine.scheduler_names import NAMES
from app.generation import PARAMETERS, GenerateRequest, ImageFormat, Kind, Limits, Parameter
from app.protocol.oip import DEFAULT_OUTPUTS, MAX_ID_LENGTH, OUTPUTS

SIZE_STEP = 8
"""SDXL's autoencoder makes 8 pixels of each latent one."""

NO_NUL = "^[^\\u0000]*$"

PICKY_SCHEDULERS = ("LCM", "PNDM", "TCD")
"""They cannot do every number of steps, which a schema cannot say; the text beside it does."""

DESCRIPTION = """\
The schema below is the plainest form of a request: one prompt, everything else as `parameters`. To get a picture into
a file:

```sh
curl -s "$SERVER/v2/models/$MODEL/infer" -d '{"inputs": [
  {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle on a white background"]}
]}' | jq -r '.outputs[0].data[0]' | base64 -d > picture.png
```

Also taken:

- **Several prompts**: `"shape": [n]` and `n` elements of `data`. Every parameter may be an input too, `BYTES` for text,
  `INT64` or `FP32` for numbers, with 1 value for all prompts or `n`, one for each.
- **Binary requests**: JSON, then the inputs' bytes. The header `Inference-Header-Content-Length` gives the number of
  bytes of JSON, the input's parameter `binary_data_size` replaces its `data`. With the header `0`, the whole body is
  one prompt as UTF-8 text. The header decides, whatever the content type says.
- **Binary answers**: all outputs with the request's parameter `binary_data_output`, one with its own parameter
  `binary_data`. `pixels` is best asked for in this form.
- **A deadline**: the request's parameter `timeout` in microseconds.
- **Schedulers that need certain steps**: `PNDM` (4 or more), `LCM` and `TCD` (50 or fewer). Each scheduler may also be
  named by its diffusers class, such as `EulerDiscreteScheduler`.
- **Any size** of which each side is a multiple of 8 and within `max_side`, and the product within `max_pixels`.
- **Bodies packed** with `Content-Encoding: gzip` or `deflate`.
"""

EXAMPLE_PROMPT = "a red circle on a white background"


def schema(limits: Limits, defaults: GenerateRequest, maxima: Mapping[str, int]) -> dict[str, Any]:
    """The schema of an infer request's JSON.

    Args:
        limits: the server's.
        defaults: what a request that asks for nothing gets.
        maxima: the model's own upper bounds by parameter.
    """
    pairs = [parameter for parameter in PARAMETERS.values() if parameter.kind is Kind.PAIR]
    return _object(
        {
            "inputs": {
                "type": "array",
                "description": "The prompt; behind it, where wanted, SDXL's size conditioning.",
                "prefixItems": [_prompt(limits), *map(_pair, pairs)],
                "minItems": 1,
                "maxItems": 1 + len(pairs),
            },
            "parameters": {
                **_object(_parameters(limits, defaults, maxima)),
                "type": ["object", "null"],
                "description": "Everything else. What is left out is the model's own choice.",
            },
            "outputs": {
                "type": ["array", "null"],
                "description": f"What comes back; {' and '.join(DEFAULT_OUTPUTS)} unless given.",
                "items": _object({"name": {"type": "string", "enum": list(OUTPUTS)}}, "name"),
                "uniqueItems": True,
                "maxItems": len(OUTPUTS),
            },
            "id": {
                "type": ["string", "null"],
                "maxLength": MAX_ID_LENGTH,
                "description": "Comes back in the answer.",
            },
        },
        "inputs",
    )


def _prompt(limits: Limits) -> dict[str, Any]:
    return _tensor(PARAMETERS["prompt"], "BYTES", 1, _text(limits))


def _pair(parameter: Parameter) -> dict[str, Any]:
    return _tensor(parameter, "INT64", 2, {"type": "integer", **_bounds(parameter)})


def _tensor(parameter: Parameter, datatype: str, count: int, element: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "name": {"type": "string", "const": parameter.name},
        "shape": {"type": "array", "const": [count]},
        "datatype": {"type": "string", "const": datatype},
        "data": {"type": "array", "items": element, "minItems": count, "maxItems": count},
    }
    return {"title": parameter.name, "description": parameter.description, **_object(fields, *fields)}


def _parameters(limits: Limits, defaults: GenerateRequest, maxima: Mapping[str, int]) -> dict[str, Any]:
    """What travels as request parameters: all that is no tensor of its own."""
    side = {"multipleOf": SIZE_STEP, "maximum": longest_side(limits)}
    schedulers = [defaults.scheduler, *(name for name in NAMES if name not in PICKY_SCHEDULERS)]
    narrower: dict[str, dict[str, Any]] = {
        "height": side,
        "width": side,
        "num_inference_steps": {"maximum": limits.max_steps},
        "num_images_per_prompt": {"maximum": limits.max_images_per_request},
        "denoising_end": {"minimum": None, "exclusiveMinimum": 0},
        **{name: {"maximum": maximum} for name, maximum in maxima.items()},
    }
    choices = {
        "scheduler": list(dict.fromkeys(name for name in schedulers if name)),
        "output_format": list(ImageFormat),
    }
    schemas: dict[str, Any] = {}
    for name, parameter in PARAMETERS.items():
        if parameter.required or parameter.kind is Kind.PAIR:
            continue
        if name in choices:
            schema: dict[str, Any] = {"type": "string", "enum": choices[name]}
        elif parameter.kind is Kind.TEXT:
            schema = _text(limits)
        else:
            schema = {"type": parameter.kind.value, **_bounds(parameter), **narrower.get(name, {})}
        schema = {"description": parameter.description, **schema, "default": getattr(defaults, name)}
        schemas[name] = {keyword: value for keyword, value in schema.items() if value is not None}
    schemas["binary_data_output"] = {
        "description": "Answer with the tensors' bytes behind the JSON instead of base64 in it.",
        "type": "boolean",
        "default": False,
    }
    return schemas


def longest_side(limits: Limits) -> int:
    """The largest height and width that fit together, however they are paired."""
    side = min(limits.max_side, math.isqrt(limits.max_pixels))
    return side // SIZE_STEP * SIZE_STEP


def _text(limits: Limits) -> dict[str, Any]:
    return {"type": "string", "maxLength": limits.max_prompt_length, "pattern": NO_NUL}


def _bounds(parameter: Parameter) -> dict[str, Any]:
    return {"minimum": parameter.minimum, "maximum": parameter.maximum}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def examples(limits: Limits) -> dict[str, Any]:
    """Requests to try, each within the limits."""
    prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [EXAMPLE_PROMPT]}
    steps, several = min(20, limits.max_steps), min(4, limits.max_images_per_request)
    return {
        "picture": {
            "summary": "One picture",
            "value": {"inputs": [prompt], "parameters": {"num_inference_steps": steps, "seed": 7}},
        },
        "several": {
            "summary": "Several pictures of one prompt",
            "value": {
                "inputs": [prompt],
                "parameters": {"num_inference_steps": steps, "num_images_per_prompt": several, "output_format": "webp"},
            },
        },
        "steered": {
            "summary": "A scheduler, guidance and a negative prompt",
            "value": {
                "id": "my-own-id",
                "inputs": [prompt],
                "parameters": {
                    "negative_prompt": "blue",
                    "num_inference_steps": steps,
                    "guidance_scale": 7.5,
                    "scheduler": "DPM++ 2M Karras",
                },
                "outputs": [{"name": "image"}],
            },
        },
        "binary": {
            "summary": "A binary answer",
            "value": {"inputs": [prompt], "parameters": {"num_inference_steps": steps, "binary_data_output": True}},
        },
    }


def answer(model_name: str) -> dict[str, Any]:
    """An answer to the first of the examples, its picture cut short."""
    return {
        "model_name": model_name,
        "parameters": {
            "content_type": "image/png",
            "guidance_scale": 5.0,
            "queue_seconds": 0.0004,
            "denoise_seconds": 2.61,
            "decode_seconds": 0.12,
            "encode_seconds": 0.02,
        },
        "outputs": [
            {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgoAAAANSUhEUgAAB…"]},
            {"name": "seed", "shape": [1], "datatype": "INT64", "data": [7]},
        ],
    }
