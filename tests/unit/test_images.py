"""Pictures out: what is written is what was painted, and the PNG says how to paint it again."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from app.generation import GenerateRequest, ImageFormat, Pixels
from app.images import encode_image

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
