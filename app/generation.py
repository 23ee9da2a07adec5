"""The shared vocabulary: what is asked for, what comes out, and how far it is.

Standard library only. Nothing here knows a protocol, a transport or a model.
"""

from __future__ import annotations

import difflib
import enum
import itertools
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from app.errors import InvalidRequest

MAX_SEED = 2**63 - 1
"""Seeds are answered as INT64."""
DEFAULT_PRIORITY = 5
MAX_PRIORITY = 9
"""1 is the most urgent."""


class Kind(enum.Enum):
    """What a parameter holds, in Python's terms."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    PAIR = "pair of integers"
    LIST = "list of numbers"
    ADAPTERS = "names and scales of adapters"
    IMAGE = "image"


class ImageFormat(enum.StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"


@dataclass(frozen=True, slots=True)
class Pixels:
    """One picture before it is encoded: ``height * width * channels`` bytes, row-major, RGB or grey."""

    data: bytes = field(repr=False)
    height: int
    width: int
    channels: int = 3


class ImageTask(enum.StrEnum):
    """What a request starts from."""

    TEXT_TO_IMAGE = "text-to-image"
    IMAGE_TO_IMAGE = "image-to-image"
    INPAINT = "inpaint"


def _parameter(kind: Kind, description: str, **bounds: float) -> dict[str, Any]:
    return {"kind": kind, "description": description, **bounds}


def _size(description: str) -> dict[str, Any]:
    # More than 65,504 is infinity to a model in float16.
    return _parameter(Kind.PAIR, description, minimum=0, maximum=65_504)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt and everything that shapes its pictures; ``None`` means the model's own default."""

    prompt: str = field(metadata=_parameter(Kind.TEXT, "What the picture shows."))
    prompt_2: str | None = field(
        default=None, metadata=_parameter(Kind.TEXT, "For the second text encoder; the prompt unless given.")
    )
    negative_prompt: str | None = field(
        default=None, metadata=_parameter(Kind.TEXT, "What the picture should not show.")
    )
    negative_prompt_2: str | None = field(
        default=None,
        metadata=_parameter(Kind.TEXT, "For the second text encoder; the negative prompt unless given."),
    )
    height: int | None = field(
        default=None,
        metadata=_parameter(
            Kind.INTEGER, "Height of the picture in pixels, a multiple of 8; of 16 for FLUX.", minimum=8
        ),
    )
    width: int | None = field(
        default=None,
        metadata=_parameter(
            Kind.INTEGER, "Width of the picture in pixels, a multiple of 8; of 16 for FLUX.", minimum=8
        ),
    )
    num_inference_steps: int | None = field(
        default=None, metadata=_parameter(Kind.INTEGER, "Denoising steps.", minimum=1)
    )
    guidance_scale: float | None = field(
        default=None,
        metadata=_parameter(
            Kind.NUMBER, "How strongly the prompt steers; 1 or less means no guidance.", minimum=0, maximum=100
        ),
    )
    guidance_rescale: float | None = field(
        default=None,
        metadata=_parameter(Kind.NUMBER, "Tames overexposure by strong guidance.", minimum=0, maximum=1),
    )
    true_cfg_scale: float | None = field(
        default=None,
        metadata=_parameter(
            Kind.NUMBER,
            "FLUX: classifier-free guidance beside the built-in one; above 1 the negative prompt counts.",
            minimum=0,
            maximum=100,
        ),
    )
    image: Pixels | bytes | None = field(
        default=None,
        metadata=_parameter(Kind.IMAGE, "Picture to start from: PNG, JPEG or WebP, or UINT8 of shape [h, w, 3]."),
    )
    mask_image: Pixels | bytes | None = field(
        default=None,
        metadata=_parameter(
            Kind.IMAGE, "Where to repaint the image (white) and where to keep it (black); or UINT8 of shape [h, w]."
        ),
    )
    strength: float | None = field(
        default=None,
        metadata=_parameter(
            Kind.NUMBER, "How far to go from the image: 0 keeps it, 1 ignores it.", minimum=0, maximum=1
        ),
    )
    seed: int | None = field(
        default=None,
        metadata=_parameter(
            Kind.INTEGER,
            "Seed of the first picture, the next has seed + 1 (0 after the largest); drawn at random unless given.",
            minimum=0,
            maximum=MAX_SEED,
        ),
    )
    num_images_per_prompt: int = field(default=1, metadata=_parameter(Kind.INTEGER, "Pictures to paint.", minimum=1))
    clip_skip: int | None = field(
        default=None,
        metadata=_parameter(Kind.INTEGER, "Text encoder layers to skip, counted from the last but one.", minimum=0),
    )
    scheduler: str | None = field(
        default=None, metadata=_parameter(Kind.TEXT, "Name of the noise scheduler, such as 'Euler'.")
    )
    use_karras_sigmas: bool | None = field(
        default=None, metadata=_parameter(Kind.BOOLEAN, "Space the scheduler's noise levels as Karras et al. do.")
    )
    use_exponential_sigmas: bool | None = field(
        default=None, metadata=_parameter(Kind.BOOLEAN, "Space the scheduler's noise levels exponentially.")
    )
    use_beta_sigmas: bool | None = field(
        default=None, metadata=_parameter(Kind.BOOLEAN, "Space the scheduler's noise levels by a beta distribution.")
    )
    timestep_spacing: str | None = field(
        default=None, metadata=_parameter(Kind.TEXT, "Spacing of the timesteps: linspace, leading or trailing.")
    )
    timesteps: tuple[float, ...] | None = field(
        default=None,
        metadata=_parameter(
            Kind.LIST, "Timesteps of one's own, falling, instead of num_inference_steps.", minimum=0, maximum=1000
        ),
    )
    sigmas: tuple[float, ...] | None = field(
        default=None,
        metadata=_parameter(
            Kind.LIST, "Noise levels of one's own, falling, instead of num_inference_steps.", minimum=0, maximum=1e6
        ),
    )
    eta: float | None = field(
        default=None, metadata=_parameter(Kind.NUMBER, "Noise that DDIM adds in each step.", minimum=0, maximum=1)
    )
    original_size: tuple[int, int] | None = field(
        default=None,
        metadata=_size("SDXL size conditioning: height, width of the imagined original."),
    )
    crops_coords_top_left: tuple[int, int] | None = field(
        default=None, metadata=_size("SDXL crop conditioning: top, left.")
    )
    target_size: tuple[int, int] | None = field(
        default=None, metadata=_size("SDXL size conditioning: height, width aimed at.")
    )
    negative_original_size: tuple[int, int] | None = field(
        default=None, metadata=_size("The same for the negative prompt; as the prompt's unless given.")
    )
    negative_crops_coords_top_left: tuple[int, int] | None = field(
        default=None, metadata=_size("The same for the negative prompt; as the prompt's unless given.")
    )
    negative_target_size: tuple[int, int] | None = field(
        default=None, metadata=_size("The same for the negative prompt; as the prompt's unless given.")
    )
    aesthetic_score: float | None = field(
        default=None, metadata=_parameter(Kind.NUMBER, "Refiner: how beautiful the picture is.", minimum=0, maximum=10)
    )
    negative_aesthetic_score: float | None = field(
        default=None,
        metadata=_parameter(Kind.NUMBER, "Refiner: how beautiful the negative prompt's is.", minimum=0, maximum=10),
    )
    denoising_limit: float | None = field(
        default=None,
        metadata=_parameter(
            Kind.NUMBER,
            "Fraction of the denoising that the base does before the refiner takes over, more than 0; 1 leaves the "
            "refiner out.",
            minimum=0,
            maximum=1,
        ),
    )
    denoising_end: float | None = field(
        default=None,
        metadata=_parameter(
            Kind.NUMBER, "Fraction of the denoising after which to stop, more than 0.", minimum=0, maximum=1
        ),
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata=_parameter(Kind.INTEGER, "FLUX: tokens of the prompt that T5 reads.", minimum=1, maximum=512),
    )
    loras: tuple[tuple[str, float], ...] | None = field(
        default=None,
        metadata=_parameter(
            Kind.ADAPTERS,
            "LoRA adapters to paint with, as NAME or NAME:SCALE, separated by commas.",
            minimum=-10,
            maximum=10,
        ),
    )
    output_format: ImageFormat = field(default=ImageFormat.PNG, metadata=_parameter(Kind.TEXT, "png, jpeg or webp."))

    @property
    def task(self) -> ImageTask:
        if self.image is None:
            return ImageTask.TEXT_TO_IMAGE
        return ImageTask.IMAGE_TO_IMAGE if self.mask_image is None else ImageTask.INPAINT


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field of `GenerateRequest` as every protocol describes it."""

    name: str
    kind: Kind
    description: str
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False


PARAMETERS: Mapping[str, Parameter] = MappingProxyType(
    {f.name: Parameter(f.name, **f.metadata, required=f.name == "prompt") for f in fields(GenerateRequest)}
)


ALIASES: Mapping[str, str] = MappingProxyType({"high_noise_frac": "denoising_limit"})
"""Other names that callers know a parameter by."""

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
MAX_LIST = 1000
"""Numbers of one list; no model is trained with more timesteps."""
MAX_ADAPTERS = 16
MAX_ADAPTERS_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for."""

    max_steps: int
    max_pixels: int
    max_images_per_request: int
    max_prompt_length: int
    max_side: int = 2048
    max_input_pixels: int = 16_777_216
    """Of all input images of one request."""


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


def check_limits(requests: Iterable[GenerateRequest], limits: Limits) -> None:
    """Refuse what is larger than the server is willing to do.

    Raises:
        InvalidRequest: naming the limit and the setting behind it.
    """
    images = 0
    for request in requests:
        images += request.num_images_per_prompt
        if images > limits.max_images_per_request:
            raise InvalidRequest(
                f"One request may ask for at most {limits.max_images_per_request} images, counting prompts times "
                "num_images_per_prompt (the server's setting max_images_per_request)."
            )
        if request.num_inference_steps is not None and request.num_inference_steps > limits.max_steps:
            raise InvalidRequest(
                f"num_inference_steps must be at most {limits.max_steps}, not "
                f"{describe(request.num_inference_steps)} (the server's setting max_steps)."
            )
        for name in ("height", "width"):
            if (getattr(request, name) or 1) > limits.max_side:
                raise InvalidRequest(
                    f"{name} must be at most {limits.max_side}, not {describe(getattr(request, name))} "
                    "(the server's setting max_side)."
                )
        if (request.height or 1) * (request.width or 1) > limits.max_pixels:
            raise InvalidRequest(
                f"height times width must be at most {limits.max_pixels} pixels (the server's setting max_pixels)."
            )
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            if len(getattr(request, name) or "") > limits.max_prompt_length:
                raise InvalidRequest(
                    f"{name} must have at most {limits.max_prompt_length} characters "
                    "(the server's setting max_prompt_length)."
                )
        steps = len(request.timesteps or request.sigmas or ())
        if steps > limits.max_steps:
            raise InvalidRequest(
                f"timesteps and sigmas may have at most {limits.max_steps} numbers, not {steps} (the server's setting "
                "max_steps)."
            )


def check_combinations(request: GenerateRequest, taken: Collection[str]) -> None:
    """Refuse parameters that the model does not have, or that contradict each other.

    Args:
        request: as the caller sent it, before a model has filled in its defaults.
        taken: names of the parameters that the model has.

    Raises:
        InvalidRequest: naming them.
    """
    for parameter in fields(request):
        if parameter.name not in taken and getattr(request, parameter.name) != parameter.default:
            raise InvalidRequest(f"This model does not take {parameter.name}; its metadata lists what it takes.")
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
    if any(later >= earlier for earlier, later in itertools.pairwise(values)):
        raise InvalidRequest(f"{name} must fall from each number to the next.")
    if name == "timesteps" and not all(value.is_integer() for value in values):
        raise InvalidRequest("timesteps must be whole numbers.")
    if request.num_inference_steps not in (None, len(values)):
        raise InvalidRequest(f"{name} has {len(values)} numbers, so leave num_inference_steps out.")
    others = [*spacings, *(["timestep_spacing"] if request.timestep_spacing is not None else [])]
    if others:
        raise InvalidRequest(f"{name} and {others[0]} contradict each other; give only one of them.")


# --- What sentences are made of --------------------------------------------------------------------------------

SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text": ("prompt",),
        "negative": ("negative_prompt",),
        "size": ("height", "width"),
        "steps": ("num_inference_steps",),
        "num_steps": ("num_inference_steps",),
        "sampling_steps": ("num_inference_steps",),
        "cfg": ("guidance_scale",),
        "cfg_scale": ("guidance_scale",),
        "guidance": ("guidance_scale",),
        "true_cfg": ("true_cfg_scale",),
        "sampler": ("scheduler",),
        "sampler_name": ("scheduler",),
        "n": ("num_images_per_prompt",),
        "batch_size": ("num_images_per_prompt",),
        "num_images": ("num_images_per_prompt",),
        "num_outputs": ("num_images_per_prompt",),
        "init_image": ("image",),
        "input_image": ("image",),
        "mask": ("mask_image",),
        "denoising_strength": ("strength",),
        "prompt_strength": ("strength",),
        "image_strength": ("strength",),
        "refiner_start": ("denoising_limit",),
        "switch_at": ("denoising_limit",),
        "lora": ("loras",),
        "adapters": ("loras",),
        "lora_scale": ("loras",),
        "response_format": ("output_format",),
        "format": ("output_format",),
    }
)
"""What other servers call a parameter; not taken here, but suggested."""

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 60
LONGEST_NUMBER = 30


def describe(value: object) -> str:
    """`value` as it can stand in a sentence, however long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**LONGEST_NUMBER:
        return f"a number with more than {LONGEST_NUMBER} digits"
    return shorten(_SHORT.repr(value[:100] if isinstance(value, str | bytes) else value), most=60)


def shorten(text: str, most: int = 100) -> str:
    """At most that many characters of `text`, with dots where the rest was."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where `name` is a common word for something known, or spelt like it; else nothing."""
    known = list(known)
    key = name[:60].lower().replace("-", "_")
    meant = [synonym for synonym in SYNONYMS.get(key, ()) if synonym in known]
    meant = meant or difflib.get_close_matches(name[:60], known, n=1)
    return f" (did you mean {' and '.join(map(repr, meant))}?)" if meant else ""


# --- What comes out --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent in each stage."""

    queue: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode: float = 0.0


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One finished picture and what is needed to paint it again."""

    request: GenerateRequest
    seed: int
    pixels: Pixels
    encoded: bytes


@dataclass(frozen=True, slots=True)
class Generation:
    """All pictures of one accepted request, in the order of its prompts, and where the time went."""

    images: tuple[GeneratedImage, ...]
    timings: Timings
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is.

    Attributes:
        steps_done: denoising steps taken, of all its images.
        steps_total: of all its images.
        place: in the queue, from 1 on; 0 once its first image has begun.
        seconds: until it is likely to be done; ``None`` while nothing like it was measured.
    """

    steps_done: int
    steps_total: int
    place: int = 0
    seconds: float | None = None


class PreviewKind(enum.StrEnum):
    LATENTS = "latents"
    VAE = "vae"


@dataclass(frozen=True, slots=True)
class PreviewWish:
    """Which previews a caller wants.

    Attributes:
        kind: small and cheap from the latents, or whole pictures from the VAE, which cost as much as a decode.
        every: denoising steps from one preview of an image to its next.
    """

    kind: PreviewKind
    every: int = 5


@dataclass(frozen=True, slots=True)
class Preview:
    """What one image of a request looks like so far.

    Attributes:
        image: its number within the request, from 0 on.
        step: denoising steps that it has.
        encoded: a file in `format`.
    """

    image: int
    step: int
    encoded: bytes
    format: ImageFormat = ImageFormat.JPEG
