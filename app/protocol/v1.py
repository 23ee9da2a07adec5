"""KServe's protocol v1: instances to `GenerateRequest` and pictures to predictions.

An instance holds the keywords of diffusers' pipelines as JSON, and the keywords that this server adds. Pure functions;
nothing here knows HTTP or a model.

Source: KServe ``docs/predict-api/v1``, and the keywords of diffusers' SDXL and FLUX pipelines.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from app.errors import InvalidRequest
from app.generation import PARAMETERS, GenerateRequest, Generation, Kind, PreviewWish
from app.parameters import ALIASES, parse_parameter
from app.protocol.strict_json import parse_json
from app.protocol.values import check_text, read_image_file
from app.sentences import describe, nearest

MAX_INSTANCES = 8192
"""Refused before work is done for each of them."""

_EMBEDDINGS = "holds numbers that only this model's text encoders make; send the prompt"
_CALLBACK = "is a function, which no request can carry"
_IP_ADAPTER = "is not served; start from a picture with image and strength"
_ADAPTER_SCALE = "is not read; name adapters and their scales with loras"

NOT_OVER_JSON: Mapping[str, str] = MappingProxyType(
    {
        "generator": "is an object of torch; send a number as seed",
        "latents": "holds noise that only this model can read; send a seed, or start from a picture with image",
        "masked_image_latents": "holds numbers that only this model can read; send mask_image",
        "prompt_embeds": _EMBEDDINGS,
        "negative_prompt_embeds": _EMBEDDINGS,
        "pooled_prompt_embeds": _EMBEDDINGS,
        "negative_pooled_prompt_embeds": _EMBEDDINGS,
        "ip_adapter_image": _IP_ADAPTER,
        "ip_adapter_image_embeds": _IP_ADAPTER,
        "negative_ip_adapter_image": _IP_ADAPTER,
        "negative_ip_adapter_image_embeds": _IP_ADAPTER,
        "cross_attention_kwargs": _ADAPTER_SCALE,
        "joint_attention_kwargs": _ADAPTER_SCALE,
        "padding_mask_crop": "is not served; send the part of the picture that is to be repainted",
        "denoising_start": "is not served on its own; send denoising_limit, or start from a picture with strength",
        "output_type": "may only be 'pil'; the answer holds files, and output_format chooses their format",
        "return_dict": "may only be true or false, and changes nothing",
        "callback": _CALLBACK,
        "callback_steps": _CALLBACK,
        "callback_on_step_end": _CALLBACK,
        "callback_on_step_end_tensor_inputs": "belongs to a function, which no request can carry",
    }
)
"""Keywords of diffusers' pipelines that make no sense in a request, and what to do instead."""

HARMLESS: Mapping[str, tuple[object, ...]] = MappingProxyType({"output_type": ("pil",), "return_dict": (True, False)})
"""Values of such keywords that ask for nothing else than what is done anyway."""


@dataclass(frozen=True, slots=True)
class PredictCall:
    """One predict call: what to generate, one request for each instance."""

    requests: tuple[GenerateRequest, ...]
    timeout: float | None = None
    """Seconds; the protocol has no place for it."""
    priority: int | None = None
    """The protocol has no place for it either."""
    preview: PreviewWish | None = None
    """Nor for this."""

    def without_requests(self) -> PredictCall:
        """What the answer needs of it."""
        return replace(self, requests=())


def parse_predict(body: bytes) -> PredictCall:
    """Read the body of a predict call, ``{"instances": [{"prompt": …}, …]}``.

    Args:
        body: JSON. As KServe has it, ``inputs`` may stand for ``instances``.

    Raises:
        InvalidRequest: with one sentence that says what to change.
    """
    document = parse_json(body)
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object with a list of instances.")
    names = ("instances", "inputs")
    for name in document:
        if name not in names:
            raise InvalidRequest(f"{describe(name)} is not a field of the protocol{nearest(name, names)}.")
    if len(document) != 1:
        raise InvalidRequest("Give instances or inputs, not both." if document else "instances is missing.")
    ((field, instances),) = document.items()
    if not isinstance(instances, list) or not instances:
        raise InvalidRequest(f"{field} must be a list of at least one object, not {describe(instances)}.")
    if len(instances) > MAX_INSTANCES:
        raise InvalidRequest(f"{field} may have at most {MAX_INSTANCES} members, not {len(instances)}.")
    return PredictCall(tuple(read_instance(f"{field}[{i}]", instance) for i, instance in enumerate(instances)))


def read_instance(place: str, instance: object) -> GenerateRequest:
    """One object of keywords.

    Args:
        place: what sentences call it.
        instance: a JSON object, it should be.

    Raises:
        InvalidRequest: with one sentence that says what to change.
    """
    if not isinstance(instance, dict):
        raise InvalidRequest(f"{place} must be an object such as {{'prompt': 'a cat'}}, not {describe(instance)}.")
    values: dict[str, Any] = {}
    for given, value in instance.items():
        name = ALIASES.get(given, given)
        if name not in PARAMETERS and name not in NOT_OVER_JSON:
            raise InvalidRequest(f"{place}: There is no parameter {describe(given)}{nearest(given, PARAMETERS)}.")
        # Clients that fill in a form send null for what is left open.
        if value is None or value in HARMLESS.get(name, ()):
            continue
        if name in NOT_OVER_JSON:
            raise InvalidRequest(f"{place}: {name} {NOT_OVER_JSON[name]}.")
        if name in values:
            raise InvalidRequest(f"{place}: {name} is given twice, under two names.")
        try:
            values[name] = _value(name, value)
        except InvalidRequest as error:
            raise InvalidRequest(f"{place}: {error}") from None
    if "prompt" not in values:
        raise InvalidRequest(f"{place}.prompt is missing.")
    return GenerateRequest(**values)


def _value(name: str, value: object) -> object:
    if PARAMETERS[name].kind is Kind.IMAGE:
        # As the protocol writes bytes, which is also how a prediction holds its picture.
        if isinstance(value, dict):
            value = value.get("b64")
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be a picture's file as base64 text, not {describe(value)}.")
        return parse_parameter(name, read_image_file(name, value))
    return parse_parameter(name, check_text(name, value))


def write_predictions(generation: Generation, model_name: str) -> bytes:
    """The body of the answer: one prediction for each picture, those of one instance after the other.

    Args:
        generation: the pictures.
        model_name: as in the URL.
    """
    predictions = [
        {
            "model_name": model_name,
            "prompt": image.request.prompt,
            "image": {
                "format": image.request.output_format.name,
                "b64": base64.b64encode(image.encoded).decode("ascii"),
            },
        }
        for image in generation.images
    ]
    return json.dumps({"predictions": predictions}, ensure_ascii=False, separators=(",", ":")).encode()
