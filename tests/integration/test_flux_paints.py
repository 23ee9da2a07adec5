"""The demo FLUX, loaded and run by the server's own code, paints what it is told in eight steps."""

from __future__ import annotations

import random
from typing import Any

import pytest
from PIL import Image

from app.demo.shapes import Drawing, judge, random_drawing
from app.engine.batcher import Batcher
from app.engine.family import Family
from app.engine.flux import FluxFamily
from app.engine.weights import load_family
from app.generation import GenerateRequest
from app.settings import Settings
from app.telemetry import Telemetry

CAPTIONS = 48
WAIT = 900.0


@pytest.fixture(scope="module")
def family() -> FluxFamily:
    loaded = load_family(Settings(model_id="demo", model_type="flux", device="cpu"))
    assert isinstance(loaded, FluxFamily)
    return loaded


@pytest.fixture(scope="module")
def painted(family: Family[Any]) -> list[tuple[Drawing, Image.Image]]:
    rng = random.Random(20_26)
    drawings = [random_drawing(rng) for _ in range(CAPTIONS)]
    batcher = Batcher(
        lambda: family,
        Telemetry("demo"),
        max_queue=CAPTIONS,
        max_batch_size=16,
        encode_threads=1,
        embed_metadata=False,
        warm_up=False,
    )
    batcher.start()
    try:
        requests = [
            GenerateRequest(prompt=drawing.caption, seed=i, num_inference_steps=8) for i, drawing in enumerate(drawings)
        ]
        tickets = [batcher.submit([family.resolve(request)], WAIT) for request in requests]
        pixels = [ticket.future.result(WAIT).images[0].pixels for ticket in tickets]
    finally:
        batcher.close(1.0)
    pictures = [Image.frombytes("RGB", (each.width, each.height), each.data) for each in pixels]
    return list(zip(drawings, pictures, strict=True))


def test_the_shape_and_what_is_behind_it_have_the_colours_asked_for(
    painted: list[tuple[Drawing, Image.Image]],
) -> None:
    verdicts = [(drawing, judge(picture)) for drawing, picture in painted]
    right = sum((v.colour, v.background) == (d.colour, d.background) for d, v in verdicts)
    assert right >= 0.9 * CAPTIONS, [(d.caption, v) for d, v in verdicts if v.colour != d.colour]


def test_the_shape_is_the_one_asked_for(painted: list[tuple[Drawing, Image.Image]]) -> None:
    verdicts = [(drawing, judge(picture)) for drawing, picture in painted]
    right = sum(v.shape == d.shape for d, v in verdicts)
    assert right >= 0.8 * CAPTIONS, [(d.caption, v) for d, v in verdicts if v.shape != d.shape]
