"""Neighbours don't matter: a request gives the same picture alone and in any company."""

from __future__ import annotations

import random

import numpy as np
import pytest

from app.engine.batcher import Batcher
from app.engine.sdxl import SdxlFamily
from app.generation import GeneratedImage, GenerateRequest
from app.telemetry import Telemetry

WAIT = 300.0
SCHEDULERS = (None, "Euler a", "DPM++ 2M Karras", "DDIM", "LCM", "Heun")


def sixteen_requests() -> list[GenerateRequest]:
    rng = random.Random(3)
    return [
        GenerateRequest(
            prompt=f"a {rng.choice(('red', 'blue'))} {rng.choice(('star', 'cross'))} on a white background",
            negative_prompt=rng.choice((None, "yellow")),
            seed=rng.randrange(2**32),
            num_inference_steps=rng.randrange(1, 9),
            guidance_scale=rng.choice((1.0, 3.0, 5.0, 7.5)),
            guidance_rescale=rng.choice((0.0, 0.0, 0.7)),
            scheduler=rng.choice(SCHEDULERS),
            crops_coords_top_left=(rng.randrange(0, 64), 0),
        )
        for _ in range(16)
    ]


def paint(family: SdxlFamily, batches: list[list[GenerateRequest]], telemetry: Telemetry) -> list[GeneratedImage]:
    """Every list at once, one list after the other."""
    batcher = Batcher(
        lambda: family,
        telemetry,
        max_queue=64,
        max_batch_size=16,
        encode_threads=1,
        embed_metadata=False,
        warm_up=False,
    )
    batcher.start()
    images = []
    try:
        for batch in batches:
            tickets = [batcher.submit([family.resolve(request)], WAIT) for request in batch]
            images += [ticket.future.result(WAIT).images[0] for ticket in tickets]
    finally:
        batcher.close(1.0)
    return images


@pytest.fixture(scope="module")
def alone(family: SdxlFamily) -> list[GeneratedImage]:
    return paint(family, [[request] for request in sixteen_requests()], Telemetry("alone"))


def test_sixteen_different_requests_at_once_give_the_pictures_that_each_gives_alone(
    family: SdxlFamily, alone: list[GeneratedImage]
) -> None:
    telemetry = Telemetry("together")
    together = paint(family, [sixteen_requests()], telemetry)
    for one, other in zip(alone, together, strict=True):
        difference = np.frombuffer(one.pixels.data, np.uint8).astype(int) - np.frombuffer(other.pixels.data, np.uint8)
        assert np.abs(difference).max() <= 2

    def sample(name: str) -> float:
        return telemetry.registry.get_sample_value(name, {"model_name": "together"}) or 0.0

    passes, rows = sample("sdxl_rows_per_forward_pass_count"), sample("sdxl_rows_per_forward_pass_sum")
    assert rows == sample("sdxl_steps_total")
    assert passes <= rows / 3, "forward passes were hardly shared"


def test_a_request_gives_the_same_bytes_again(family: SdxlFamily, alone: list[GeneratedImage]) -> None:
    again = paint(family, [[request] for request in sixteen_requests()[:3]], Telemetry("again"))
    assert [image.encoded for image in again] == [image.encoded for image in alone[:3]]
