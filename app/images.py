"""Pixels out as PNG, JPEG or WebP; init images and masks in, with limits.

Knows Pillow and nothing of requests' transport or models.
"""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import zlib

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageFormat, Pixels

INPUT_FORMATS = ("PNG", "JPEG", "WEBP")

# Level 1 is three times as fast as Pillow's default for a few per cent more bytes.
_SAVE_OPTIONS = {
    ImageFormat.PNG: {"compress_level": 1},
    ImageFormat.JPEG: {"quality": 95},
    ImageFormat.WEBP: {"quality": 95, "method": 2},
}


def encode_image(pixels: Pixels, request: GenerateRequest, seed: int, embed_metadata: bool) -> bytes:
    """Encode one picture in the format that its request asks for.

    Args:
        pixels: the picture.
        request: with every default filled in; what the PNG's text chunks say.
        seed: the picture's own seed.
        embed_metadata: write the text chunks ``prompt``, ``negative_prompt``, ``seed`` and ``parameters`` (JSON).
    """
    image = Image.frombuffer("RGB", (pixels.width, pixels.height), pixels.data, "raw", "RGB", 0, 1)
    options = dict(_SAVE_OPTIONS[request.output_format])
    if request.output_format is ImageFormat.PNG and embed_metadata:
        options["pnginfo"] = _text_chunks(request, seed)  # type: ignore[assignment]
    buffer = io.BytesIO()
    image.save(buffer, format=request.output_format.value, **options)
    return buffer.getvalue()


def decode_image(name: str, data: bytes, max_pixels: int) -> Pixels:
    """Read an input image as RGB, or as grey where it is a mask, upright as its EXIF orientation says.

    Args:
        name: of the parameter, for sentences; ``mask_image`` is read as grey.
        data: a PNG, JPEG or WebP file; other formats are never tried.
        max_pixels: larger pictures are refused before they are unpacked.

    Raises:
        InvalidRequest: not such a file, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=INPUT_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise InvalidRequest(
                    f"{name} has {image.width} x {image.height} pixels; at most {max_pixels} are read (the server's "
                    "setting max_input_pixels)."
                )
            upright = ImageOps.exif_transpose(image)
            picture = _grey(upright) if name == "mask_image" else _rgb(upright)
    except InvalidRequest:
        raise
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, MemoryError, Image.DecompressionBombError):
        raise InvalidRequest(f"{name} cannot be read; send a whole PNG, JPEG or WebP file.") from None
    return Pixels(picture.tobytes(), picture.height, picture.width, len(picture.getbands()))


def _rgb(image: Image.Image) -> Image.Image:
    """What is transparent becomes white, as on a page."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = Image.new("RGBA", image.size, "white")
    layered.alpha_composite(image.convert("RGBA"))
    return layered.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return _rgb(image).convert("L")


def to_pil(pixels: Pixels) -> Image.Image:
    """The picture as Pillow's image, ``RGB`` or ``L``."""
    return Image.frombytes("RGB" if pixels.channels == 3 else "L", (pixels.width, pixels.height), pixels.data)


def _text_chunks(request: GenerateRequest, seed: int) -> PngInfo:
    parameters = {
        name: value
        for name, value in ((field.name, getattr(request, field.name)) for field in dataclasses.fields(request))
        if value is not None and name not in ("prompt", "num_images_per_prompt", "image", "mask_image")
    }
    parameters["seed"] = seed
    chunks = PngInfo()
    chunks.add_text("prompt", request.prompt)
    if request.negative_prompt is not None:
        chunks.add_text("negative_prompt", request.negative_prompt)
    chunks.add_text("seed", str(seed))
    chunks.add_text("parameters", json.dumps(parameters, ensure_ascii=False))
    return chunks
