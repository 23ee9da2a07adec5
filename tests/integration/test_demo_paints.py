"""The demo paints what it is told, judged by comparing with drawn outlines."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from app.demo.shapes import COLOURS, SHAPES, Drawing, draw, judge, random_drawing
from app.engine.batcher import Batcher
from app.engine.sdxl import SdxlFamily
from app.generation import GenerateRequest
from app.telemetry import Telemetry

CAPTIONS = 128
"""Enough that a share of 98 % means something: of 96, two unlucky ones decide."""
WAIT = 600.0


@pytest.fixture(scope="module")
def painted(family: SdxlFamily) -> list[tuple[Drawing, Image.Image]]:
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
        tickets = [
            batcher.submit([family.resolve(GenerateRequest(prompt=d.caption, seed=i, num_inference_steps=20))], WAIT)
            for i, d in enumerate(drawings)
        ]
        pixels = [ticket.future.result(WAIT).images[0].pixels for ticket in tickets]
    finally:
        batcher.close(1.0)
    pictures = [Image.frombytes("RGB", (each.width, each.height), each.data) for each in pixels]
    return list(zip(drawings, pictures, strict=True))


def test_the_judge_knows_every_drawing() -> None:
    rng = random.Random(1)
    for _ in range(100):
        drawing = random_drawing(rng)
        verdict = judge(draw(drawing, 128, 128, rng))
        assert (verdict.colour, verdict.shape, verdict.background) == (
            drawing.colour,
            drawing.shape,
            drawing.background,
        )


def test_the_judge_is_not_fooled_by_another_shape() -> None:
    rng = random.Random(2)
    for shape in SHAPES:
        other = next(each for each in SHAPES if each != shape)
        assert judge(draw(Drawing("red", shape, "white"), 128, 128, rng)).shape != other


def test_the_shape_and_what_is_behind_it_have_the_colours_asked_for(
    painted: list[tuple[Drawing, Image.Image]],
) -> None:
    verdicts = [(drawing, judge(picture)) for drawing, picture in painted]
    right = sum((v.colour, v.background) == (d.colour, d.background) for d, v in verdicts)
    assert right >= 0.98 * CAPTIONS, [(d.caption, v) for d, v in verdicts if v.colour != d.colour]


def test_the_shape_is_the_one_asked_for(painted: list[tuple[Drawing, Image.Image]]) -> None:
    verdicts = [(drawing, judge(picture)) for drawing, picture in painted]
    right = sum(v.shape == d.shape for d, v in verdicts)
    assert right >= 0.92 * CAPTIONS, [(d.caption, v) for d, v in verdicts if v.shape != d.shape]


def test_the_size_word_makes_a_difference(family: SdxlFamily, painted: list[tuple[Drawing, Image.Image]]) -> None:
    def area(picture: Image.Image, drawing: Drawing) -> int:
        away = np.abs(np.asarray(picture, np.int32) - COLOURS[drawing.colour])
        return int((away.max(axis=-1) < 60).sum())

    areas: dict[str, list[int]] = {"small": [], "large": []}
    for drawing, picture in painted:
        if drawing.size and drawing.shape in ("circle", "square"):
            areas[drawing.size].append(area(picture, drawing))
    assert max(areas["small"]) < min(areas["large"])
