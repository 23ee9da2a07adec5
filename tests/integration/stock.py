"""The stock pipelines that our pictures are held against, and one of our own jobs from start to end."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from app.engine.family import Family
from app.generation import GenerateRequest
from app.images import decode_images


def ours(family: Family[Any], **parameters: Any) -> np.ndarray:
    """One request alone, through all four stages: uint8 ``[h, w, 3]``."""
    request = resolved(family, **parameters)
    job = family.begin(request, family.encode(request))
    assert job.num_steps == family.steps(request), "what it takes is known before it begins"
    while not job.done:
        family.step([job])
    picture: np.ndarray = family.decode([job])[0]
    return picture


def resolved(family: Family[Any], **parameters: Any) -> GenerateRequest:
    """A request with Pillow's images, and with the lists that the stock pipelines take."""
    for name in ("timesteps", "sigmas"):
        if name in parameters:
            parameters[name] = tuple(parameters[name])
    for name in ("image", "mask_image"):
        if isinstance(parameters.get(name), Image.Image):
            (parameters[name],) = decode_images([(name, png(parameters[name]))], 10**7)
    return family.resolve(GenerateRequest(**parameters))


def theirs(pipeline: Any, seed: int | torch.Generator, **parameters: Any) -> Any:
    """The same from a stock pipeline; a generator instead of a seed goes on where it is."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    output = pipeline(**parameters, generator=generator).images
    return output if isinstance(output, torch.Tensor) else np.asarray(output[0])


def check_idle(family: Family[Any], common: dict[str, Any], idle: dict[str, Any], message: str) -> None:
    """What is said to change nothing changes no pixel."""
    (sentence,) = family.warnings(resolved(family, **common, **idle))
    assert message in sentence
    assert np.array_equal(ours(family, **common, **idle), ours(family, **common))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels; pictures that people cannot tell apart have 40 and more."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(width: int = 128, height: int = 128) -> Image.Image:
    """A green square on yellow, with something going on."""
    image = Image.new("RGB", (width, height), (240, 210, 50))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill=(40, 170, 70))
    draw.line((0, 0, width, height), fill=(20, 20, 20), width=3)
    return image


def mask(width: int = 128, height: int = 128) -> Image.Image:
    """White in a circle of the middle."""
    image = Image.new("L", (width, height), 0)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill=255)
    return image
