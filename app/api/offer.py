"""What a server and its model take, as JSON Schema: one schema for each parameter, whatever protocol it comes by.

A schema is strict: every value that follows it is served. Parameters whose right values no schema can tell are left to
`CONDITIONS`, in words. Nothing here knows OpenAPI or a protocol.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from app.engine.family import Family
from app.errors import InvalidRequest
from app.generation import (
    PARAMETERS,
    GenerateRequest,
    ImageFormat,
    ImageTask,
    Kind,
    Limits,
    Parameter,
    Pixels,
)
from app.parameters import MAX_LIST, TIMESTEP_SPACINGS

NO_NUL = "^[^\\u0000]*$"
IMAGE_PARAMETERS = ("image", "mask_image", "strength")

PICKY_SCHEDULERS = ("LCM", "PNDM", "TCD")
"""They cannot do every number of steps, which a schema cannot say; the text beside it does."""

CONDITIONS: Mapping[str, str] = MappingProxyType(
    {
        "clip_skip": "for prompts of up to 75 tokens without weights such as `(word:1.3)`",
        "use_karras_sigmas": "for schedulers of noise levels such as `Euler` and `DPM++ 2M`; at most one of the three",
        "use_exponential_sigmas": "the same",
        "use_beta_sigmas": "the same",
        "timestep_spacing": f"{', '.join(TIMESTEP_SPACINGS)}; for schedulers that have it, such as `Euler`",
        "timesteps": "whole numbers that fall, for schedulers such as `Euler`, without `num_inference_steps`",
        "sigmas": "numbers that fall, for SDXL to 0; for schedulers such as `Euler`, without `num_inference_steps`",
        "max_sequence_length": "at least as many as the prompt has tokens",
    }
)
"""Parameters that go with some values of others only, and with which."""

EXAMPLE_SIDE = 64
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX/////AADrWueTAAAAgElEQVR42r3QsQ2DQBBE0cdCQGAZSsAduANTEiVQ"
    "GqVQAiEB8jm4wFi6xAkTjfbPajXLteo2BKZ7HtQpLQQNA0FLT/DkRjASeQtUJFRCBbPIcPxmTqaBoYha6IvoL7PDVkQHrEX0huVcx0z6PbHIOV1K"
    "G8FONgcrNcnrcXrvlfoAVy4aHSoIu8MAAAAASUVORK5CYII="
)
"""A red circle on white, 64 x 64 pixels, as base64 of a PNG."""
EXAMPLE_MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAHklEQVR42mNgIAcwMv9hYGBgYDjIBBMZZQx1BnkAAADDAihDeDNB"
    "AAAAAElFTkSuQmCC"
)
"""Of the same size; white, to be painted again, but for its margin."""


class Offer:
    """What one model serves within a server's limits.

    Args:
        limits: the server's.
        family: the loaded model; ``None`` while there is none yet.
    """

    def __init__(self, limits: Limits, family: Family[Any] | None) -> None:
        self.limits = limits
        self._family: Family[Any] | type[Family[Any]] = Family if family is None else family
        # Each task's defaults, for the tasks that the model has.
        self._defaults = {task: request for task in ImageTask if (request := _resolve(family, task)) is not None}
        self._least_strengths = {task: self._least_strength(task) for task in self._defaults}

    @property
    def tasks(self) -> list[ImageTask]:
        """What requests may start from. For images, an example has to fit into the limits, and so has its default."""
        fits = self.longest_side >= EXAMPLE_SIDE and self.limits.max_input_pixels >= 2 * EXAMPLE_SIDE**2
        return [
            task
            for task, default in self._defaults.items()
            if task is ImageTask.TEXT_TO_IMAGE or (fits and (default.num_inference_steps or 0) <= self.limits.max_steps)
        ]

    @property
    def size_step(self) -> int:
        return self._family.size_step

    @property
    def longest_side(self) -> int:
        """The largest height and width that fit together, however they are paired."""
        side = min(self.limits.max_side, math.isqrt(self.limits.max_pixels))
        return side // self.size_step * self.size_step

    @property
    def usual_size(self) -> dict[str, int]:
        """The model's own height and width, where the limits let it have them."""
        default = self._defaults.get(ImageTask.TEXT_TO_IMAGE)
        sizes = {"height": default.height, "width": default.width} if default else {}
        return {name: size for name, size in sizes.items() if size is not None and size <= self.longest_side}

    @property
    def has_picky_schedulers(self) -> bool:
        return not set(PICKY_SCHEDULERS).isdisjoint(self._family.schedulers)

    @property
    def has_adapters(self) -> bool:
        return bool(self._family.adapters)

    def takes(self, name: str) -> bool:
        return name in self._family.parameters

    def conditions(self) -> str:
        """The parameters that no schema can tell, as a table in Markdown."""
        rows = [f"| `{name}` | {when} |" for name, when in CONDITIONS.items() if self.takes(name)]
        head = ["\nParameters that go with some values of others only:\n", "| name | goes with |", "|---|---|"]
        return "\n".join([*head, *rows])

    @staticmethod
    def foreign(task: ImageTask) -> tuple[str, ...]:
        """The parameters that only other tasks have."""
        return {ImageTask.TEXT_TO_IMAGE: IMAGE_PARAMETERS, ImageTask.IMAGE_TO_IMAGE: ("mask_image",)}.get(task, ())

    def names(self, task: ImageTask) -> list[str]:
        """The parameters of a task that a schema can tell."""
        left_out = {*CONDITIONS, *self.foreign(task), *(() if self.has_adapters else ("loras",))}
        if task is not ImageTask.TEXT_TO_IMAGE:
            # With it, the least strength would hang on it; without it, on the default.
            left_out.add("num_inference_steps")
        return [name for name in PARAMETERS if self.takes(name) and name not in left_out]

    def schema(self, name: str, task: ImageTask = ImageTask.TEXT_TO_IMAGE) -> dict[str, Any]:
        """The schema of one parameter's value, with its meaning and its default."""
        parameter = PARAMETERS[name]
        schema = {**self._of_kind(parameter), **self._narrower(name, task)}
        default = getattr(self._defaults.get(task), name, None)
        if not parameter.required and parameter.kind not in (Kind.IMAGE, Kind.ADAPTERS):
            schema["default"] = default
        told = {keyword: value for keyword, value in schema.items() if value is not None}
        return {"description": parameter.description, **told}

    def _of_kind(self, parameter: Parameter) -> dict[str, Any]:
        maximum = self._family.maxima.get(parameter.name)
        number = {"minimum": parameter.minimum, "maximum": parameter.maximum if maximum is None else maximum}
        match parameter.kind:
            case Kind.TEXT:
                return {"type": "string", "maxLength": self.limits.max_prompt_length, "pattern": NO_NUL}
            case Kind.INTEGER | Kind.NUMBER | Kind.BOOLEAN:
                return {"type": parameter.kind.value, **number}
            case Kind.PAIR:
                return {"type": "array", "items": {"type": "integer", **number}, "minItems": 2, "maxItems": 2}
            case Kind.LIST:
                return {"type": "array", "items": {"type": "number", **number}, "minItems": 1, "maxItems": MAX_LIST}
            case Kind.ADAPTERS:
                names = "|".join(map(re.escape, self._family.adapters))
                return {"type": "string", "pattern": f"^({names})(:-?[0-9](\\.[0-9]{{1,9}})?)?$"}
            case Kind.IMAGE:
                # No pattern tells a picture from other bytes. Any PNG, JPEG or WebP file is taken, as the text says.
                example = EXAMPLE_MASK if parameter.name == "mask_image" else EXAMPLE_IMAGE
                return {"type": "string", "contentEncoding": "base64", "enum": [example]}

    def _narrower(self, name: str, task: ImageTask) -> dict[str, Any]:
        """What holds for one parameter besides its kind."""
        side = {"multipleOf": self.size_step, "minimum": self.size_step, "maximum": self.longest_side}
        more_than_zero = {"minimum": None, "exclusiveMinimum": 0}
        default = self._defaults[task].scheduler if task in self._defaults else None
        schedulers = [default, *(name for name in self._family.schedulers if name not in PICKY_SCHEDULERS)]
        schemas: dict[str, dict[str, Any]] = {
            "height": side,
            "width": side,
            "num_inference_steps": {"maximum": self.limits.max_steps},
            "num_images_per_prompt": {"maximum": self.limits.max_images_per_request},
            "strength": {"minimum": self._least_strengths.get(task, 0)},
            "denoising_end": more_than_zero,
            "denoising_limit": more_than_zero,
            "scheduler": {"maxLength": None, "pattern": None, "enum": list(dict.fromkeys(filter(None, schedulers)))},
            "timestep_spacing": {"maxLength": None, "pattern": None, "enum": list(TIMESTEP_SPACINGS)},
            "output_format": {"maxLength": None, "pattern": None, "enum": list(ImageFormat)},
        }
        return schemas.get(name, {})

    def _least_strength(self, task: ImageTask) -> float:
        """As the model has it, of as many steps as it does by default."""
        if isinstance(self._family, type) or task is ImageTask.TEXT_TO_IMAGE:
            return 0
        low, high = 0.0, 1.0
        if _resolve(self._family, task, strength=low) is not None:
            return low
        # Halved until no number lies between.
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if _resolve(self._family, task, strength=middle) is not None else (middle, high)
        return high


def _resolve(family: Family[Any] | None, task: ImageTask, **parameters: Any) -> GenerateRequest | None:
    """What a request with nothing but `parameters` becomes; ``None`` where the model refuses it."""
    request = GenerateRequest(prompt="", **parameters)
    if task is not ImageTask.TEXT_TO_IMAGE:
        if family is not None and "image" not in family.parameters:
            return None
        picture = Pixels(bytes(3 * EXAMPLE_SIDE**2), EXAMPLE_SIDE, EXAMPLE_SIDE)
        mask = Pixels(bytes(EXAMPLE_SIDE**2), EXAMPLE_SIDE, EXAMPLE_SIDE, channels=1)
        request = replace(request, image=picture, mask_image=mask if task is ImageTask.INPAINT else None)
    try:
        return family.resolve(request) if family is not None else request
    except InvalidRequest:
        return None
