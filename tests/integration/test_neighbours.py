"""Neighbours don't matter: a request gives the same picture alone and in any company."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.batcher import Batcher
from app.engine.scheduler_names import NAMES
from app.engine.sdxl import SdxlFamily
from app.errors import OutOfMemory
from app.generation import GeneratedImage, GenerateRequest
from app.images import decode_images
from app.telemetry import Telemetry
from tests.integration.stock import mask, ours, picture, png

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


def sixteen_of_every_kind() -> list[GenerateRequest]:
    """Text to image, refined from different limits, image to image and inpainting, in two sizes."""
    rng = random.Random(8)
    (image, covered) = decode_images([("image", png(picture())), ("mask_image", png(mask()))], 10**6)
    kinds: list[dict[str, Any]] = [
        {"denoising_limit": 1.0},
        {"denoising_limit": 0.5},
        {"denoising_limit": 0.8},
        {"denoising_limit": 1.0, "image": image, "strength": 0.7},
        {"denoising_limit": 0.6, "image": image, "strength": 0.9},
        {"denoising_limit": 1.0, "image": image, "mask_image": covered},
        {"denoising_limit": 0.7, "image": image, "mask_image": covered, "strength": 0.8},
        {"denoising_limit": 0.7, "height": 96, "width": 160},
    ]
    return [
        GenerateRequest(
            prompt=f"a {rng.choice(('red', 'blue'))} {rng.choice(('star', 'cross'))} on a white background",
            seed=rng.randrange(2**32),
            num_inference_steps=rng.randrange(4, 9),
            guidance_scale=rng.choice((1.0, 5.0)),
            scheduler=rng.choice(SCHEDULERS),
            **kind,
        )
        for kind in kinds * 2
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

    passes, rows = sample("sdxl_images_per_forward_pass_count"), sample("sdxl_images_per_forward_pass_sum")
    assert rows == sample("sdxl_steps_total")
    assert passes <= rows / 3, "forward passes were hardly shared"


def test_a_request_gives_the_same_bytes_again(family: SdxlFamily, alone: list[GeneratedImage]) -> None:
    again = paint(family, [[request] for request in sixteen_requests()[:3]], Telemetry("again"))
    assert [image.encoded for image in again] == [image.encoded for image in alone[:3]]


def test_sixteen_requests_of_every_kind_at_once_give_the_pictures_that_each_gives_alone(refined: SdxlFamily) -> None:
    requests = sixteen_of_every_kind()
    telemetry = Telemetry("kinds")
    alone = paint(refined, [[request] for request in requests], Telemetry("one by one"))
    together = paint(refined, [requests], telemetry)
    for request, one, other in zip(requests, alone, together, strict=True):
        difference = np.frombuffer(one.pixels.data, np.uint8).astype(int) - np.frombuffer(other.pixels.data, np.uint8)
        assert np.abs(difference).max() <= 2, request
    passes = telemetry.registry.get_sample_value("sdxl_images_per_forward_pass_count", {"model_name": "kinds"}) or 0.0
    steps = telemetry.registry.get_sample_value("sdxl_steps_total", {"model_name": "kinds"}) or 0.0
    assert passes <= steps / 2, "forward passes were hardly shared"


def test_no_scheduler_shows_company_however_much_it_magnifies_rounding(family: SdxlFamily) -> None:
    requests = [
        GenerateRequest(prompt="a red star", seed=seed, num_inference_steps=12, guidance_scale=15.0, scheduler=name)
        for seed, name in enumerate(NAMES)
    ]
    alone = paint(family, [[request] for request in requests], Telemetry("schedulers alone"))
    together = paint(family, [requests], Telemetry("schedulers together"))
    for name, one, other in zip(NAMES, alone, together, strict=True):
        difference = np.frombuffer(one.pixels.data, np.uint8).astype(int) - np.frombuffer(other.pixels.data, np.uint8)
        assert np.abs(difference).max() <= 2, name


@pytest.mark.parametrize(
    "scheduler", ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ SDE", "UniPC", "Heun", "LMS"]
)
@pytest.mark.parametrize("kind", ["text", "inpaint"])
def test_a_step_that_did_not_fit_leaves_the_job_as_it_was(
    refined: SdxlFamily, monkeypatch: pytest.MonkeyPatch, scheduler: str, kind: str
) -> None:
    parameters: dict[str, Any] = {"denoising_limit": 0.6, "num_inference_steps": 5, "scheduler": scheduler}
    if kind == "inpaint":
        (image, covered) = decode_images([("image", png(picture())), ("mask_image", png(mask()))], 10**6)
        parameters |= {"image": image, "mask_image": covered}
    request = refined.resolve(GenerateRequest(prompt="a red star", seed=3, **parameters))
    wanted = ours(refined, prompt="a red star", seed=3, **parameters)
    job = refined.begin(request, refined.encode(request))
    while not job.done:
        # Memory ends after the scheduler's own step: its counters and random numbers have moved on by then.
        scheduler_class = type(job.leg.scheduler)
        step = scheduler_class.step

        def too_large(self: Any, *arguments: Any, step: Any = step, **options: Any) -> Any:
            step(self, *arguments, **options)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with monkeypatch.context() as patch:
            patch.setattr(scheduler_class, "step", too_large)
            with pytest.raises(OutOfMemory):
                refined.step([job])
        refined.step([job])
    assert np.array_equal(refined.decode([job])[0], wanted)
