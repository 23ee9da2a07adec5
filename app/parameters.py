"""Values in the types of `GenerateRequest`, exactly or not at all, and what they may be together and within limits.

Standard library only. Nothing here knows a protocol, a transport or a model.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ctypes import c_float
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar

from app.errors import InvalidRequest
from app.generation import PARAMETERS, GenerateRequest, ImageFormat, Kind, Limits, Parameter, Pixels
from app.sentences import counted, describe

ALIASES: Mapping[str, str] = MappingProxyType({"high_noise_frac": "denoising_limit"})
"""Other names that callers know a parameter by."""

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
MAX_LIST = 1000
"""Numbers of one list; no model is trained with more timesteps."""
MAX_ADAPTERS = 16
MAX_ADAPTERS_TEXT = 4096

T = TypeVar("T")


def parse_parameter(name: str, value: object) -> object:
    """Bring one value into the type of its parameter, exactly or not at all.

    Args:
        name: a key of `PARAMETERS`.
        value: text, a number, a list, a map of adapters to scales, or an image, as a protocol delivered it.

    Raises:
        InvalidRequest: the value has another type, is not exact, or lies outside the parameter's own bounds.
    """
    parameter = PARAMETERS[name]
    if parameter.kind is Kind.TEXT:
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be text, not {describe(value)}.")
        return _TEXT_CHOICES[name](value) if name in _TEXT_CHOICES else value
    return _PARSERS[parameter.kind](parameter, value)


def _boolean(parameter: Parameter, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{parameter.name} must be true or false, not {describe(value)}.")
    return value


def _pair(parameter: Parameter, value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidRequest(f"{parameter.name} must be two whole numbers, not {describe(value)}.")
    return _integer(parameter, value[0]), _integer(parameter, value[1])


def _list(parameter: Parameter, value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_LIST:
        raise InvalidRequest(f"{parameter.name} must be 1 to {MAX_LIST} numbers, not {describe(value)}.")
    return tuple(_number(parameter, each) for each in value)


def _adapters(parameter: Parameter, value: object) -> tuple[tuple[str, float], ...]:
    """``"a:0.5, b"``, ``["a:0.5", "b"]`` or ``{"a": 0.5, "b": 1}``; no adapter at all is an empty tuple."""
    parts: object = value
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, str):
        if len(value) > MAX_ADAPTERS_TEXT:
            raise InvalidRequest(f"{parameter.name} may have at most {MAX_ADAPTERS_TEXT} characters.")
        parts = [part for part in value.split(",") if part.strip()]
    if not isinstance(parts, list | tuple):
        raise InvalidRequest(f"{parameter.name} must be names such as 'style:0.8, detail', not {describe(value)}.")
    if len(parts) > MAX_ADAPTERS:
        raise InvalidRequest(f"{parameter.name} may name at most {MAX_ADAPTERS} adapters.")
    adapters = tuple(_adapter(parameter, part) for part in parts)
    if len({name for name, _ in adapters}) < len(adapters):
        raise InvalidRequest(f"{parameter.name} names an adapter twice.")
    return adapters


def _adapter(parameter: Parameter, part: object) -> tuple[str, float]:
    name, scale = part if isinstance(part, tuple) and len(part) == 2 else (part, 1.0)
    if isinstance(part, str):
        name, colon, text = part.rpartition(":")
        if not colon:
            name = part
        elif not _NUMBER.fullmatch(text.strip()):
            raise InvalidRequest(f"{parameter.name}: the scale in {describe(part)} is not a number.")
        else:
            scale = float(text)
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequest(f"{parameter.name} must be names such as 'style:0.8, detail', not {describe(part)}.")
    return name.strip(), _number(parameter, scale)


# float() also reads underscores, "nan", "infinity" and other scripts' digits.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def write_adapters(adapters: Iterable[tuple[str, float]]) -> str:
    """Adapters as a request names them: ``style:0.8,detail:1``."""
    return ",".join(f"{name}:{scale:g}" for name, scale in adapters)


def _image(parameter: Parameter, value: object) -> Pixels | bytes:
    if not isinstance(value, Pixels | bytes):
        raise InvalidRequest(f"{parameter.name} must be the bytes of a PNG, JPEG or WebP file.")
    return value


def _integer(parameter: Parameter, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{parameter.name} must be a whole number, not {describe(value)}.")
    _check_bounds(parameter, value)
    return value


def _number(parameter: Parameter, value: object) -> float:
    # An integer can be too large for isfinite().
    if not isinstance(value, int | float) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise InvalidRequest(f"{parameter.name} must be a finite number, not {describe(value)}.")
    _check_bounds(parameter, value)
    return float(value)


def _check_bounds(parameter: Parameter, value: float) -> None:
    if parameter.minimum is not None and value < parameter.minimum:
        raise InvalidRequest(f"{parameter.name} must be at least {parameter.minimum}, not {describe(value)}.")
    if parameter.maximum is not None and value > parameter.maximum:
        raise InvalidRequest(f"{parameter.name} must be at most {parameter.maximum}, not {describe(value)}.")


def _image_format(value: str) -> ImageFormat:
    name = value.lower().removeprefix("image/")
    try:
        return ImageFormat("jpeg" if name == "jpg" else name)
    except ValueError:
        known = ", ".join(ImageFormat)
        raise InvalidRequest(f"output_format must be one of {known}, not {describe(value)}.") from None


def _spacing(value: str) -> str:
    if value.lower() not in TIMESTEP_SPACINGS:
        raise InvalidRequest(f"timestep_spacing must be one of {', '.join(TIMESTEP_SPACINGS)}, not {describe(value)}.")
    return value.lower()


_TEXT_CHOICES: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"output_format": _image_format, "timestep_spacing": _spacing}
)
_PARSERS: Mapping[Kind, Callable[[Parameter, object], object]] = MappingProxyType(
    {
        Kind.INTEGER: _integer,
        Kind.NUMBER: _number,
        Kind.BOOLEAN: _boolean,
        Kind.PAIR: _pair,
        Kind.LIST: _list,
        Kind.ADAPTERS: _adapters,
        Kind.IMAGE: _image,
    }
)


def for_each(requests: Sequence[GenerateRequest], do: Callable[[GenerateRequest], T]) -> list[T]:
    """What `do` gives for each of the requests that make one.

    Raises:
        InvalidRequest: by `do`; of several prompts it says which one is meant, unless all are refused.
    """
    results = []
    for number, request in enumerate(requests, 1):
        try:
            results.append(do(request))
        except InvalidRequest as error:
            if not results and not _any_passes(requests[1:], do):
                raise
            raise of_prompt(number, len(requests), error) from None
    return results


def of_prompt(number: int, count: int, error: InvalidRequest) -> InvalidRequest:
    """The same about the one of several prompts that is meant."""
    return InvalidRequest(f"Prompt {number} of {count}: {error}")


def _any_passes(requests: Sequence[GenerateRequest], do: Callable[[GenerateRequest], object]) -> bool:
    for request in requests:
        try:
            do(request)
        except InvalidRequest:
            continue
        return True
    return False


def check_limits(requests: Sequence[GenerateRequest], limits: Limits) -> None:
    """Refuse what is larger than the server is willing to do.

    Raises:
        InvalidRequest: naming the limit and the setting behind it.
    """
    if sum(request.num_images_per_prompt for request in requests) > limits.max_images_per_request:
        raise InvalidRequest(
            f"One request may ask for at most {limits.max_images_per_request} images, counting prompts times "
            "num_images_per_prompt (the server's setting max_images_per_request)."
        )
    for_each(requests, lambda request: _check_sizes(request, limits))


def _check_sizes(request: GenerateRequest, limits: Limits) -> None:
    if request.num_inference_steps is not None and request.num_inference_steps > limits.max_steps:
        raise InvalidRequest(
            f"num_inference_steps must be at most {limits.max_steps}, not "
            f"{describe(request.num_inference_steps)} (the server's setting max_steps)."
        )
    for name in ("height", "width"):
        if (getattr(request, name) or 1) > limits.max_side:
            raise InvalidRequest(
                f"{name} must be at most {limits.max_side}, not {describe(getattr(request, name))} "
                f"(the server's setting max_side){_smaller(request)}."
            )
    if (request.height or 1) * (request.width or 1) > limits.max_pixels:
        raise InvalidRequest(
            f"height times width must be at most {limits.max_pixels} pixels (the server's setting max_pixels)"
            f"{_smaller(request)}."
        )
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        if len(getattr(request, name) or "") > limits.max_prompt_length:
            raise InvalidRequest(
                f"{name} must have at most {limits.max_prompt_length} characters "
                "(the server's setting max_prompt_length)."
            )
    for name, more in (("timesteps", 0), ("sigmas", 1)):
        # The last of sigmas may only be where the last step leads to; the model knows.
        count, most = len(getattr(request, name) or ()), limits.max_steps + more
        if count > most:
            raise InvalidRequest(
                f"{name} may have at most {most} numbers, not {count} (the server's setting max_steps)."
            )


def _smaller(request: GenerateRequest) -> str:
    """What to do about a size that nobody gave: it is the input image's own."""
    own = request.image
    is_own = isinstance(own, Pixels) and (own.height, own.width) == (request.height, request.width)
    return "; this is the image's own size: give height and width to have it resized" if is_own else ""


_WAYS_OUT = {
    "loras": "no adapter is loaded (the server's setting lora)",
    "guidance_end": "it does where the server's setting optimize is max",
}
"""About parameters that a setting of the server adds to a model."""


def check_combinations(request: GenerateRequest, taken: Collection[str]) -> None:
    """Refuse parameters that the model does not have, or that contradict each other.

    Args:
        request: as the caller sent it, before a model has filled in its defaults.
        taken: names of the parameters that the model has.

    Raises:
        InvalidRequest: naming them.
    """
    for parameter in fields(request):
        # No adapters at all can be had everywhere.
        if parameter.name not in taken and getattr(request, parameter.name) not in (parameter.default, ()):
            way_out = _WAYS_OUT.get(parameter.name, "its metadata lists what it takes")
            raise InvalidRequest(f"This model does not take {parameter.name}; {way_out}.")
    if request.denoising_end == 0:
        raise InvalidRequest("denoising_end must be more than 0; leave it out to denoise to the end.")
    if request.denoising_limit == 0:
        raise InvalidRequest("denoising_limit must be more than 0; the base has to begin.")
    if request.image is None:
        for name in ("mask_image", "strength"):
            if getattr(request, name) is not None:
                raise InvalidRequest(f"{name} needs the input image.")
    spacings = [name for name in SIGMA_SPACINGS if getattr(request, name)]
    if len(spacings) > 1:
        raise InvalidRequest(f"Give only one of {' and '.join(spacings)}.")
    schedules = [name for name in ("timesteps", "sigmas") if getattr(request, name) is not None]
    if len(schedules) > 1:
        raise InvalidRequest("Give timesteps or sigmas, not both.")
    for name in schedules:
        _check_schedule(request, name, spacings)


def _check_schedule(request: GenerateRequest, name: str, spacings: Sequence[str]) -> None:
    """A schedule of the caller's own falls, and leaves nothing for other parameters to say about it."""
    values: tuple[float, ...] = getattr(request, name)
    # In the precision that schedulers have.
    if any(later >= earlier for earlier, later in itertools.pairwise(c_float(value).value for value in values)):
        raise InvalidRequest(f"{name} must fall from each number to the next.")
    if name == "timesteps" and not all(value.is_integer() for value in values):
        raise InvalidRequest("timesteps must be whole numbers.")
    # As many as its numbers; where the last one is only where the steps lead to, one less.
    counts = (len(values), len(values) - 1) if name == "sigmas" else (len(values),)
    if request.num_inference_steps not in (None, *counts):
        raise InvalidRequest(f"{name} has {counted(len(values), 'number')}, so leave num_inference_steps out.")
    others = [*spacings, *(["timestep_spacing"] if request.timestep_spacing is not None else [])]
    if others:
        raise InvalidRequest(f"{name} and {others[0]} contradict each other; give only one of them.")
