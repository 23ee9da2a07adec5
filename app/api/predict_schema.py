"""What a v1 predict request may say, as JSON Schema and in examples. Nothing here knows OpenAPI."""

from __future__ import annotations

from typing import Any

from app.api.infer_schema import EXAMPLE_PROMPT
from app.api.offer import Offer
from app.generation import PARAMETERS, ImageTask, Kind

DESCRIPTION = """\
An instance holds the keywords of diffusers' SDXL and FLUX pipelines, pairs and lists as JSON lists, and this server's
own: `seed`, `scheduler`, `loras`, `output_format`, and `denoising_limit`, which has no effect without a refiner. `null`
means "not given". Keywords that are objects of Python, such as `generator` and `latents`, are refused with a sentence
that says what to send instead. Images go in as base64 text, or as `{"b64": "…"}`.

`loras` may also be an object of names and scales, as `{"style": 0.8}`.

There is one prediction for each picture: those of the first instance, then those of the second. Their seeds come in the
header `X-Seed`, in the same order, and in each PNG. `inputs` may stand for `instances`.
"""


def description(offer: Offer) -> str:
    """What the schema cannot say, for those who read."""
    return DESCRIPTION + offer.conditions()


def schema(offer: Offer) -> dict[str, Any]:
    """The schema of a predict request's JSON."""
    instances = {
        "type": "array",
        "items": {"oneOf": [instance(offer, task) for task in offer.tasks]},
        "minItems": 1,
        "maxItems": offer.limits.max_images_per_request,
        # All pictures of all instances count; this is as much of it as a schema can say.
        "anyOf": [{"maxItems": 1}, {"items": {"properties": {"num_images_per_prompt": {"enum": [1, None]}}}}],
    }
    return {
        "type": "object",
        "properties": {"instances": instances},
        "additionalProperties": False,
        "required": ["instances"],
    }


def instance(offer: Offer, task: ImageTask) -> dict[str, Any]:
    """The schema of one object of keywords."""
    names = offer.names(task)
    # What belongs to another task may be said not to be given.
    foreign = filter(offer.takes, offer.foreign(task))
    return {
        "title": task.value,
        "type": "object",
        "properties": {
            **{name: _property(offer, name, task) for name in names},
            **{name: {"type": "null", "description": PARAMETERS[name].description} for name in foreign},
        },
        "additionalProperties": False,
        "required": [name for name in ("prompt", "image", "mask_image") if name in names],
    }


def _property(offer: Offer, name: str, task: ImageTask) -> dict[str, Any]:
    schema = offer.schema(name, task)
    is_needed = PARAMETERS[name].required or PARAMETERS[name].kind is Kind.IMAGE
    return schema if is_needed else or_null(schema)


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, and null besides, which means "not given"."""
    nullable = {**schema, "type": [schema["type"], "null"]}
    return {**nullable, "enum": [*schema["enum"], None]} if "enum" in schema else nullable


def examples(offer: Offer) -> dict[str, Any]:
    """Requests to try, each within the limits."""
    steps = min(20, offer.limits.max_steps)
    side = min(128, offer.longest_side)
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
