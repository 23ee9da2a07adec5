"""The shared vocabulary: what is asked for, what comes out, and how far it is.

Standard library only. Nothing here knows a protocol, a transport or a model.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

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
    guidance_end: float | None = field(
        default=None,
        metadata=_parameter(
            Kind.NUMBER,
            "Fraction of the denoising after which the negative prompt no longer counts: faster, and another picture.",
            minimum=0,
            maximum=1,
        ),
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
            Kind.NUMBER, "How far to go from the image: near 0 keeps it, 1 ignores it.", minimum=0, maximum=1
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
            Kind.LIST,
            "Noise levels of one's own, falling, instead of num_inference_steps; for SDXL down to a last 0, which FLUX "
            "has by itself.",
            minimum=0,
            maximum=1e6,
        ),
    )
    eta: float | None = field(
        default=None, metadata=_parameter(Kind.NUMBER, "Noise that DDIM or TCD add in each step.", minimum=0, maximum=1)
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
        default=None,
        metadata=_size(
            "For the negative prompt; as the prompt's unless given. Without an image it needs negative_target_size."
        ),
    )
    negative_crops_coords_top_left: tuple[int, int] | None = field(
        default=None,
        metadata=_size("For the negative prompt; 0, 0 unless given. Without an image it needs both negative sizes."),
    )
    negative_target_size: tuple[int, int] | None = field(
        default=None,
        metadata=_size(
            "For the negative prompt; as the prompt's unless given. Without an image it needs negative_original_size."
        ),
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
    lossy: tuple[str, ...] = ()
    """What was done at the price of the pictures."""


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
