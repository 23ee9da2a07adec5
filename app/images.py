"""Pixels out as PNG, JPEG or WebP; input images and masks in, with limits.

Knows Pillow and nothing of requests' transport or models.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.WebPImagePlugin import WebPImageFile

from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageFormat, Pixels
from app.image_files import essentials, image_format
from app.parameters import write_adapters

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


# Chosen by hand: Pillow's own choice would try further formats, and warn of large pictures on standard error.
_READERS: dict[str | None, type[ImageFile]] = {"PNG": PngImageFile, "JPEG": JpegImageFile, "WEBP": WebPImageFile}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation that Exif knows."""


def decode_images(files: Iterable[tuple[str, Pixels | bytes]], max_pixels: int) -> Iterator[Pixels]:
    """Read input images, one by one, as RGB, or as grey where they are masks, upright as their Exif orientation says.

    Of an animation, the first frame counts; what is transparent becomes white; colour profiles are not applied, as in
    diffusers' ``load_image``.

    Args:
        files: names of parameters, for sentences and because a ``mask_image`` is read as grey; and PNG, JPEG or WebP
            files, or pixels, which are left as they are.
        max_pixels: of all together; what is more is refused before it is unpacked.

    Raises:
        InvalidRequest: not such a file, damaged, or too large.
    """
    used = 0
    for name, file in files:
        picture = file if isinstance(file, Pixels) else _decode(name, file, max_pixels, used)
        _check_size(name, picture.width, picture.height, max_pixels, used)
        used += picture.width * picture.height
        yield picture


def _decode(name: str, data: bytes, max_pixels: int, used: int) -> Pixels:
    kind = image_format(data)
    if kind is None:
        raise InvalidRequest(f"{name} is no PNG, JPEG or WebP file; send one of these.")
    try:
        file, orientation = essentials(data)
        with _READERS[kind](io.BytesIO(file)) as image:
            _check_size(name, image.width, image.height, max_pixels, used)
            picture = _grey(image) if name == "mask_image" else _rgb(image)
            if orientation in _UPRIGHT:
                picture = picture.transpose(_UPRIGHT[orientation])
            return Pixels(picture.tobytes(), picture.height, picture.width, len(picture.getbands()))
    except InvalidRequest:
        raise
    except Exception:
        # Pillow raises a dozen kinds of errors for damaged files, and new ones with every release.
        raise InvalidRequest(f"{name} cannot be read; send a whole PNG, JPEG or WebP file.") from None


def _check_size(name: str, width: int, height: int, max_pixels: int, used: int) -> None:
    if width * height > max_pixels - used:
        raise InvalidRequest(
            f"{name} has {width} x {height} pixels; all images of a request may have {max_pixels} together (the "
            "server's setting max_input_pixels)."
        )


def _rgb(image: Image.Image) -> Image.Image:
    """What is transparent becomes white, as on a page."""
    if image.mode == "I;16":
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = Image.new("RGBA", image.size, "white")
    layered.alpha_composite(image.convert("RGBA"))
    return layered.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return _rgb(image).convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, of which Pillow's own conversion would make white all but the darkest 255."""
    levels = np.asarray(image)
    grey = (levels >> 8).astype(np.uint8)
    grey[levels == image.info.get("transparency")] = 255
    return Image.fromarray(grey)


def resize(picture: Pixels, height: int, width: int) -> Pixels:
    """As the image processors of the stock pipelines do; itself where it has that size."""
    if (picture.height, picture.width) == (height, width):
        return picture
    resized = to_pil(picture).resize((width, height), Image.Resampling.LANCZOS)
    return Pixels(resized.tobytes(), height, width, picture.channels)


def to_pil(pixels: Pixels) -> Image.Image:
    """The picture as Pillow's image, ``RGB`` or ``L``."""
    return Image.frombytes("RGB" if pixels.channels == 3 else "L", (pixels.width, pixels.height), pixels.data)


def _text_chunks(request: GenerateRequest, seed: int) -> PngInfo:
    parameters = {
        name: value
        for name, value in ((field.name, getattr(request, field.name)) for field in dataclasses.fields(request))
        if value is not None and name not in ("prompt", "num_images_per_prompt", "image", "mask_image")
    }
    if request.loras is not None:
        parameters["loras"] = write_adapters(request.loras)
    parameters["seed"] = seed
    chunks = PngInfo()
    chunks.add_text("prompt", request.prompt)
    if request.negative_prompt is not None:
        chunks.add_text("negative_prompt", request.negative_prompt)
    chunks.add_text("seed", str(seed))
    chunks.add_text("parameters", json.dumps(parameters, ensure_ascii=False))
    return chunks
