"""What a v1 predict request may say, as JSON Schema and in examples. Nothing here knows OpenAPI."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from app.api.infer_schema import EXAMPLE_PROMPT, NO_NUL, PICKY_SCHEDULERS, SIZE_STEP, longest_side
from app.engine.scheduler_names import NAMES
from app.generation import (
    PARAMETERS,
    SIGMA_SPACINGS,
    TIMESTEP_SPACINGS,
    GenerateRequest,
    ImageFormat,
    Kind,
    Limits,
    Parameter,
)

PICTURE_FORMAT = "picture"
"""JSON Schema's word for what a pattern cannot say: base64 of a whole PNG, JPEG or WebP file."""

TOLD_IN_TEXT = ("timesteps", "sigmas", "loras")
"""What makes their values right, a schema cannot say."""

DESCRIPTION = """\
An instance holds the keywords of diffusers' SDXL and FLUX pipelines, pairs and lists as JSON lists, and this server's
own: `seed`, `scheduler`, `loras`, `output_format`, and `denoising_limit`, which has no effect without a refiner. `null`
means "not given". Keywords that are objects of Python, such as `generator` and `latents`, are refused with a sentence
that says what to send instead. Images go in as base64 text, or as `{"b64": "…"}`.

Also taken: `timesteps` or `sigmas`, lists of numbers that fall, without `num_inference_steps` or another spacing; and
`loras`, names and scales of adapters that the server has loaded, as `{"style": 0.8}`.

There is one prediction for each picture: those of the first instance, then those of the second. Their seeds come in the
header `X-Seed`, in the same order, and in each PNG. `inputs` may stand for `instances`.
"""


def schema(
    limits: Limits, defaults: GenerateRequest, maxima: Mapping[str, int], taken: Collection[str]
) -> dict[str, Any]:
    """The schema of a predict request's JSON.

    Args:
        limits: the server's.
        defaults: what a request that asks for nothing gets.
        maxima: the model's own upper bounds by parameter.
        taken: names of the parameters that the model has.
    """
    instance = {
        "type": "object",
        "properties": {
            parameter.name: _property(parameter, limits, defaults, maxima)
            for parameter in PARAMETERS.values()
            if parameter.name in taken and parameter.name not in TOLD_IN_TEXT
        },
        "additionalProperties": False,
        "required": ["prompt"],
        "allOf": [
            _one_of(_without("mask_image", "strength"), {**_with("image", "string"), "required": ["image"]}),
            _one_of(
                *(
                    _without(*(name for name in SIGMA_SPACINGS if name != free), or_else=False)
                    for free in SIGMA_SPACINGS
                )
            ),
        ],
    }
    instances = {
        "type": "array",
        "items": instance,
        "minItems": 1,
        "maxItems": limits.max_images_per_request,
        # All pictures of all instances count; this is as much of it as a schema can say.
        **_one_of({"maxItems": 1}, {"items": {"properties": {"num_images_per_prompt": {"enum": [1, None]}}}}),
    }
    return {
        "type": "object",
        "properties": {"instances": instances},
        "additionalProperties": False,
        "required": ["instances"],
    }


def _one_of(*options: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(options)}


def _without(*names: str, or_else: object = None) -> dict[str, Any]:
    """An instance in which each of `names` is absent, null or `or_else`."""
    return {"properties": {name: {"enum": list(dict.fromkeys((None, or_else)))} for name in names}}


def _with(name: str, kind: str) -> dict[str, Any]:
    return {"properties": {name: {"type": kind}}}


def _property(
    parameter: Parameter, limits: Limits, defaults: GenerateRequest, maxima: Mapping[str, int]
) -> dict[str, Any]:
    schema = {**_KIND_SCHEMAS[parameter.kind](parameter, limits), **_narrower(parameter.name, limits, defaults)}
    schema = {keyword: value for keyword, value in schema.items() if value is not None}
    if parameter.name in maxima:
        schema["maximum"] = maxima[parameter.name]
    default = getattr(defaults, parameter.name)
    if default is not None and parameter.kind is not Kind.IMAGE:
        schema["default"] = default
    if not parameter.required:
        schema["type"] = [schema["type"], "null"]
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    return {"description": parameter.description, **schema}


def _numbers(parameter: Parameter, kind: str) -> dict[str, Any]:
    bounds = {"minimum": parameter.minimum, "maximum": parameter.maximum}
    return {"type": kind, **{keyword: bound for keyword, bound in bounds.items() if bound is not None}}


_KIND_SCHEMAS: Mapping[Kind, Callable[[Parameter, Limits], dict[str, Any]]] = {
    Kind.TEXT: lambda _, limits: {"type": "string", "maxLength": limits.max_prompt_length, "pattern": NO_NUL},
    Kind.INTEGER: lambda parameter, _: _numbers(parameter, "integer"),
    Kind.NUMBER: lambda parameter, _: _numbers(parameter, "number"),
    Kind.BOOLEAN: lambda _, __: {"type": "boolean"},
    Kind.PAIR: lambda parameter, _: {
        "type": "array",
        "items": _numbers(parameter, "integer"),
        "minItems": 2,
        "maxItems": 2,
    },
    Kind.IMAGE: lambda _, __: {"type": "string", "contentEncoding": "base64", "format": PICTURE_FORMAT},
}


def _narrower(name: str, limits: Limits, defaults: GenerateRequest) -> dict[str, Any]:
    """What holds for one parameter besides its kind."""
    side = {"multipleOf": SIZE_STEP, "maximum": longest_side(limits)}
    more_than_zero = {"minimum": None, "exclusiveMinimum": 0}
    schedulers = [defaults.scheduler, *(name for name in NAMES if name not in PICKY_SCHEDULERS)]
    schemas: dict[str, dict[str, Any]] = {
        "height": side,
        "width": side,
        "num_inference_steps": {"maximum": limits.max_steps},
        "num_images_per_prompt": {"maximum": limits.max_images_per_request},
        "denoising_end": more_than_zero,
        "denoising_limit": more_than_zero,
        "scheduler": {"enum": list(dict.fromkeys(filter(None, schedulers)))},
        "timestep_spacing": {"enum": list(TIMESTEP_SPACINGS)},
        "output_format": {"enum": list(ImageFormat)},
    }
    return schemas.get(name, {})


def examples(limits: Limits) -> dict[str, Any]:
    """Requests to try, each within the limits."""
    steps = min(20, limits.max_steps)
    side = min(128, longest_side(limits))
    return {
        "picture": {
            "summary": "One picture",
            "value": {"instances": [{"prompt": EXAMPLE_PROMPT, "num_inference_steps": steps, "seed": 7}]},
        },
        "keywords": {
            "summary": "Keywords of the pipeline",
            "value": {
                "instances": [
                    {
                        "prompt": EXAMPLE_PROMPT,
                        "guidance_scale": 8.0,
                        "num_inference_steps": steps,
                        "crops_coords_top_left": [64, 0],
                        "width": side,
                        "height": side,
                        "denoising_limit": 0.8,
                    }
                ]
            },
        },
    }


def answer(model_name: str) -> dict[str, Any]:
    """An answer to the first of the examples, its picture cut short."""
    image = {"format": "PNG", "b64": "iVBORw0KGgoAAAANSUhEUgAAB…"}
    return {"predictions": [{"model_name": model_name, "prompt": EXAMPLE_PROMPT, "image": image}]}
