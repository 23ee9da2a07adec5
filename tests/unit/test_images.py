"""Pictures out and in: what is written is what was painted, and nothing that is read can hurt."""

from __future__ import annotations

import io
import json
import resource
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from app.errors import InvalidRequest
from app.generation import GenerateRequest, ImageFormat, Pixels
from app.images import decode_images, encode_image

REQUEST = GenerateRequest(
    prompt="ein Kätzchen, 日本", negative_prompt="dog", height=8, width=16, num_inference_steps=4, target_size=(8, 16)
)
PIXELS = Pixels(np.arange(8 * 16 * 3, dtype=np.uint8).tobytes(), height=8, width=16)


def test_a_png_holds_every_pixel_and_how_it_was_made() -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, REQUEST, seed=7, embed_metadata=True)))
    assert image.format == "PNG" and image.size == (16, 8) and image.tobytes() == PIXELS.data
    assert image.info["prompt"] == "ein Kätzchen, 日本"
    assert image.info["negative_prompt"] == "dog"
    assert image.info["seed"] == "7"
    parameters = json.loads(image.info["parameters"])
    assert parameters["seed"] == 7 and parameters["num_inference_steps"] == 4 and parameters["target_size"] == [8, 16]


def test_text_chunks_can_be_turned_off() -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, REQUEST, seed=7, embed_metadata=False)))
    assert image.info == {}


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_every_format_is_written_as_asked(image_format: ImageFormat) -> None:
    data = encode_image(PIXELS, replace(REQUEST, output_format=image_format), seed=7, embed_metadata=True)
    image = Image.open(io.BytesIO(data))
    assert image.format == image_format.value.upper() and image.size == (16, 8)


# --- Pictures in -----------------------------------------------------------------------------------------------

MANY = 10**9


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decode(data: bytes, name: str = "image", max_pixels: int = MANY) -> Pixels:
    (pixels,) = decode_images([(name, data)], max_pixels)
    return pixels


def dots(*colours: Any, mode: str = "RGB") -> Image.Image:
    """A picture one pixel high."""
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*between: bytes, width: int = 2, height: int = 2, content: bytes = b"\0abcdef" * 2, depth: int = 8) -> bytes:
    """An RGB picture made by hand, with chunks before its data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *between, chunk(b"IDAT", zlib.compress(content)), chunk(b"IEND")))


def exif(orientation: int, order: str = "<") -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_every_known_format_is_read(image_format: str) -> None:
    picture = Image.new("RGB", (5, 3), (255, 0, 0))
    pixels = decode(encoded(picture, image_format, lossless=True))
    assert (pixels.width, pixels.height, pixels.channels) == (5, 3, 3)
    assert all(abs(got - wanted) <= 2 for got, wanted in zip(pixels.data, (255, 0, 0) * 15, strict=True))


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_refused(image_format: str) -> None:
    with pytest.raises(InvalidRequest, match="image is no PNG, JPEG or WebP file; send one of these"):
        decode(encoded(Image.new("RGB", (16, 16)), image_format))


@pytest.mark.parametrize("data", [b"", b"hello", b"8BPS\0\1", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7",
                                  b"http://example.org/cat.png", b"\0" * 100, b"RIFF\0\0\0\0WAVE"])  # fmt: skip
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="is no PNG, JPEG or WebP file"):
        decode(data)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused_wherever_it_is_cut(image_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    data = encoded(Image.fromarray(noise), image_format)
    for end in (12, 20, 30, 40, len(data) // 2, len(data) - 200):
        with pytest.raises(InvalidRequest, match=r"^image cannot be read; send a whole PNG, JPEG or WebP file\.$"):
            decode(data[:end])


def test_damaged_data_is_refused() -> None:
    good = png()
    assert decode(good).data == b"abcdef" * 2
    middle = good.index(b"IDAT") + 8
    for bad in (
        good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :],  # neither zlib's checksum nor PNG's fits
        png(content=b"\0abc"),  # too little
        png(content=b"\7abcdef" * 2),  # an unknown filter
        png(depth=3),
        png(width=0),
        png(height=0),
        good[: good.index(b"IDAT") - 4] + chunk(b"IEND"),  # nothing at all
    ):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            decode(bad)


@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=9)
)
def test_any_damage_gives_a_picture_or_a_sentence(image_format: str, changes: list[tuple[int, int]]) -> None:
    image = Image.new("P", (9, 7)) if image_format == "PNG" else Image.new("RGB", (9, 7), "teal")
    data = bytearray(encoded(image, image_format, exif=exif(6)))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        pixels = decode(bytes(data), max_pixels=10_000)
    except InvalidRequest as error:
        assert str(error).startswith("image ")
    else:
        assert len(pixels.data) == pixels.width * pixels.height * 3 <= 30_000


# --- What costs much is refused before it costs ----------------------------------------------------------------


def test_large_pictures_are_refused_before_they_are_unpacked() -> None:
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 65_000, 65_000)
    webp = bytearray(encoded(Image.new("RGBA", (8, 8)), "WEBP"))
    webp[24:30] = (16_382).to_bytes(3, "little") * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (png(width=2**31 - 1, height=2**31 - 1), png(width=12_000, height=10_000), bytes(jpeg), bytes(webp)):
        with pytest.raises(InvalidRequest, match=r"image (has \d+ x \d+ pixels; all images|cannot be read)"):
            decode(data, max_pixels=16_777_216)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_the_pixels_of_all_images_of_a_request_count_together() -> None:
    square = encoded(Image.new("RGB", (10, 10)))
    plain = Pixels(bytes(300), 10, 10)
    assert len(list(decode_images([("image", square), ("mask_image", square), ("image", plain)], 300))) == 3
    for second in (square, plain):
        with pytest.raises(InvalidRequest, match="10 x 10 pixels; all images of a request may have 199"):
            list(decode_images([("image", square), ("mask_image", second)], 199))


BOMBS = {
    "a million text chunks": lambda: png(chunk(b"tEXt", b"a\0b") * 10**6),
    "a million unknown chunks": lambda: png(chunk(b"prVt") * 10**6),
    "a million empty data chunks": lambda: png(chunk(b"IDAT") * 10**6),
    "a million comments": lambda: jpeg_with(b"\xff\xfe\0\2" * 10**6),
    "a million fill bytes": lambda: jpeg_with(b"\xff" * 10**6),
    "ten thousand scans": lambda: jpeg_with(b"")[:-2] + b"\xff\xda" * 10**4 + b"\xff\xd9",
    "ten thousand scans that something hides": lambda: jpeg_with(b"")[:-2] + b"\xff\xe1\xff\xff" + b"\xff\xda" * 10**4,
    "scans beside an end of no picture": lambda: jpeg_with(b"")[:-2] + b"\xff\xda\0\x04\xff\xd9" * 10**4,
    "a million RIFF chunks": lambda: encoded(Image.new("RGB", (8, 8)), "WEBP") + b"NONE\0\0\0\0" * 10**6,
}


def jpeg_with(segments: bytes) -> bytes:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG")
    return data[:2] + segments + data[2:]


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_a_file_of_far_too_many_parts_is_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        decode(make())


def test_texts_and_profiles_are_skipped_however_large_they_would_be_unpacked() -> None:
    endless = zlib.compress(bytes(10**8))
    plain = decode(png())
    for extra in (
        chunk(b"zTXt", b"comment\0\0" + endless),
        chunk(b"iTXt", b"comment\0\1\0\0\0" + endless),
        chunk(b"iCCP", b"profile\0\0" + endless),
        chunk(b"tEXt", b"comment\0" + bytes(10**7)),
        chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
    ):
        assert decode(png(extra)) == plain
    red = decode(jpeg_with(b""))
    assert decode(jpeg_with((b"\xff\xe1\xff\xff" + bytes(65_533)) * 100)) == red
    assert decode(jpeg_with(b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527))) == red


def test_what_lies_behind_a_picture_does_not_count_though_it_looks_like_parts_of_one() -> None:
    film = bytes(4) + b"ftypmp42" + b"\xff\xda\xff\xd9\xff\xe1" * 10**6  # as phones put it behind a photo
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})):
        data = encoded(picture, kind, **options)
        assert decode(data + film) == decode(data)


# --- What is seen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_stands_upright_as_its_camera_was_held(image_format: str, order: str) -> None:
    big = Image.new("RGB", (32, 16), "black")
    big.paste("white", (0, 0, 16, 8))  # the upper left quarter
    # Where that quarter lies once upright, by orientation, as (x, y) in halves, and whether the sides are swapped.
    upright = {1: (0, 0, False), 2: (1, 0, False), 3: (1, 1, False), 4: (0, 1, False),
               5: (0, 0, True), 6: (1, 0, True), 7: (1, 1, True), 8: (0, 1, True)}  # fmt: skip
    for orientation, (right, low, swapped) in upright.items():
        pixels = decode(encoded(big, image_format, exif=b"Exif\0\0" + exif(orientation, order)))
        assert (pixels.width, pixels.height) == ((16, 32) if swapped else (32, 16))
        seen = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)[..., 0] > 127
        half = np.split(seen, 2, axis=0)[low]
        assert seen.sum() == 128 and np.split(half, 2, axis=1)[right].all()


@pytest.mark.parametrize("data", [b"", b"junk", b"II*\0", b"II*\0\xff\xff\xff\xff", exif(0), exif(9), exif(6)[:17],
                                  b"II*\0\x08\0\0\0\xff\xff" + b"\1" * 100])  # fmt: skip
def test_exif_data_that_says_nothing_is_no_reason_to_turn_or_refuse(data: bytes) -> None:
    plain = decode(png())
    assert decode(png(chunk(b"eXIf", data))) == plain


def test_what_is_transparent_is_white() -> None:
    faint = dots((255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 128), mode="RGBA")
    assert decode(encoded(faint)).data == bytes([255, 255, 255, 255, 0, 0, 127, 127, 127])
    assert decode(encoded(dots((9, 0), (9, 255), mode="LA"))).data == bytes([255] * 3 + [9] * 3)
    palette = dots(0, 1, mode="P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert decode(encoded(palette)).data == bytes([255, 0, 0, 0, 255, 0])
    assert decode(encoded(palette, transparency=1)).data == bytes([255, 0, 0, 255, 255, 255])
    assert decode(encoded(dots((1, 2, 3), (4, 5, 6)), transparency=(1, 2, 3))).data == bytes([255, 255, 255, 4, 5, 6])


def test_sixteen_bits_and_one_bit_keep_their_shades() -> None:
    deep = Image.fromarray(np.array([[0, 255, 256, 32_768, 65_535]], np.uint16))
    assert decode(encoded(deep), "mask_image").data == bytes([0, 0, 1, 128, 255])
    assert decode(encoded(deep, transparency=0), "mask_image").data == bytes([255, 0, 1, 128, 255])
    assert decode(encoded(dots(0, 1, mode="1"))).data == bytes([0] * 3 + [255] * 3)


def test_a_printers_colours_become_a_screens() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = decode(encoded(cyan, "JPEG", quality=100)).data[:3]
    assert red < 10 and green > 245 and blue > 245


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data).data == bytes([255, 0, 0]) * 64


def test_a_mask_is_grey_and_every_other_image_has_three_colours() -> None:
    data = encoded(dots((255, 255, 255), (0, 0, 0), (128, 128, 128)))
    assert decode(data, "mask_image") == Pixels(bytes([255, 0, 128]), 1, 3, channels=1)
    assert decode(encoded(Image.new("L", (2, 2), 7))).channels == 3


def test_colour_profiles_are_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = dots((10, 200, 30), (1, 2, 3))
    for image_format in ("PNG", "WEBP"):
        assert decode(encoded(plain, image_format, icc_profile=profile, lossless=True)).data == plain.tobytes()
