"""The demo short of memory, beside neighbours that leave, and with previews: every picture is its own."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.batcher import Batcher
from app.engine.sdxl import SdxlFamily
from app.engine.ticket import Ticket
from app.errors import Cancelled, DeviceLost, InvalidRequest, OutOfMemory
from app.generation import GeneratedImage, GenerateRequest, Preview, PreviewKind, PreviewWish, Progress
from app.telemetry import Telemetry
from tests.simulation import places_taken

WAIT = 300.0


@contextmanager
def batching(family: SdxlFamily, **options: Any) -> Iterator[tuple[Batcher, Telemetry]]:
    telemetry = Telemetry("demo")
    settings: dict[str, Any] = {"max_queue": 500, "max_batch_size": 32, "encode_threads": 1, "embed_metadata": False}
    batcher = Batcher(lambda: family, telemetry, warm_up=False, **(settings | options))
    batcher.start()
    try:
        batcher.ready.result(WAIT)
        yield batcher, telemetry
    finally:
        batcher.close(1.0)


def metric(telemetry: Telemetry, name: str, **labels: str) -> float:
    return telemetry.registry.get_sample_value(name, {"model_name": "demo", **labels}) or 0.0


def request(seed: int, **parameters: Any) -> GenerateRequest:
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2 + seed % 3, "guidance_scale": 5.0}
    colour = ("red", "green", "blue", "yellow")[seed % 4]
    return GenerateRequest(prompt=f"a {colour} circle on a white background", seed=seed, **(options | parameters))


def submit(batcher: Batcher, family: SdxlFamily, each: GenerateRequest, **options: Any) -> Ticket:
    return batcher.submit([family.resolve(each)], WAIT, **options)


def picture(ticket: Ticket) -> GeneratedImage:
    return ticket.future.result(WAIT).images[0]


def assert_alike(one: GeneratedImage, other: GeneratedImage) -> None:
    difference = np.frombuffer(one.pixels.data, np.uint8).astype(int) - np.frombuffer(other.pixels.data, np.uint8)
    assert np.abs(difference).max() <= 2


def alone(family: SdxlFamily, requests: list[GenerateRequest]) -> list[GeneratedImage]:
    with batching(family) as (batcher, _):
        return [picture(submit(batcher, family, each)) for each in requests]


def short_of_memory(call: Callable[..., Any], most: int) -> Callable[..., Any]:
    """A module's forward pass that has no room for more than so many rows."""

    def forward(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(sample, *args, **kwargs)

    return forward


@pytest.mark.parametrize(("module", "most"), [("unet", 3), ("vae.decode", 1)])
def test_a_full_device_costs_nobody_a_picture(
    family: SdxlFamily, monkeypatch: pytest.MonkeyPatch, module: str, most: int
) -> None:
    requests = [request(seed) for seed in range(6)]
    wanted = alone(family, requests)
    pipeline = family._pipeline
    owner, name = (pipeline.unet, "forward") if module == "unet" else (pipeline.vae, "decode")
    monkeypatch.setattr(owner, name, short_of_memory(getattr(owner, name), most))
    with batching(family) as (batcher, telemetry):
        # One ticket: its rows enter every pass and every decode together, whatever else the machine does.
        ticket = batcher.submit([family.resolve(each) for each in requests], WAIT)
        for image, expected in zip(ticket.future.result(WAIT).images, wanted, strict=True):
            assert_alike(image, expected)
        stage = "denoise_step" if module == "unet" else "decode"
        assert metric(telemetry, "sdxl_out_of_memory_total", stage=stage, action="split") >= 1
        assert batcher.alive


def test_what_does_not_fit_at_all_is_refused_and_the_next_request_gets_its_picture(
    family: SdxlFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    with batching(family) as (batcher, _):
        picture(submit(batcher, family, request(1)))
        with monkeypatch.context() as patch:
            patch.setattr(family._pipeline.unet, "forward", short_of_memory(family._pipeline.unet.forward, 0))
            with pytest.raises(OutOfMemory, match="128 x 128; try 64 x 64"):
                picture(submit(batcher, family, request(1, height=128, width=128)))
        assert picture(submit(batcher, family, request(2, height=128, width=128))).encoded


def test_a_step_that_memory_ended_is_taken_again_as_if_for_the_first_time(family: SdxlFamily) -> None:
    for scheduler in sorted(family.schedulers):
        try:
            asked = family.resolve(request(1, scheduler=scheduler, num_inference_steps=5))
        except InvalidRequest:
            continue  # it takes no number of steps
        pictures = []
        for attempts in (1, 2):
            job = family.begin(asked, family.encode(asked))
            kind = type(job.leg.scheduler)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kind, "step", ends_in_vain(kind.step, attempts))
                while not job.done:
                    for _ in range(attempts - 1):
                        with pytest.raises(OutOfMemory):
                            family.step([job])
                    family.step([job])
            pictures.append(family.decode([job])[0])
        assert np.array_equal(*pictures), scheduler


def ends_in_vain(step: Callable[..., Any], attempts: int) -> Callable[..., Any]:
    """A scheduler's step that has no memory left when it is done, but for the last of so many attempts."""
    calls = itertools.count(1)

    @functools.wraps(step)
    def ends(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if next(calls) % attempts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    return ends


def test_a_poisoned_device_ends_the_batcher(family: SdxlFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    lost: list[BaseException] = []
    monkeypatch.setattr(family._pipeline.unet, "forward", poisoned)
    with batching(family, on_lost=lost.append) as (batcher, _):
        with pytest.raises(DeviceLost, match="restarted"):
            picture(submit(batcher, family, request(1)))
        batcher._threads[0].join(WAIT)
        assert not batcher.alive and len(lost) == 1


@pytest.mark.parametrize("kind", list(PreviewKind))
def test_previews_change_no_pixel_and_look_like_the_picture_in_the_end(family: SdxlFamily, kind: PreviewKind) -> None:
    each = request(3, num_inference_steps=8)
    (expected,) = alone(family, [each])
    heard: list[Progress | Preview] = []
    with batching(family) as (batcher, telemetry):
        ticket = submit(batcher, family, each, listener=heard.append, preview=PreviewWish(kind, 3))
        assert picture(ticket).encoded == expected.encoded
        deadline = time.monotonic() + WAIT
        while sum(isinstance(news, Preview) for news in heard) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert metric(telemetry, "sdxl_previews_total", outcome="shown") == 2
    previews = [news for news in heard if isinstance(news, Preview)]
    assert sorted(news.step for news in previews) == [3, 6]
    assert all(news.encoded.startswith(b"\xff\xd8") for news in previews)


def test_two_hundred_cancels_among_four_hundred_requests_lose_nobody_elses_picture(family: SdxlFamily) -> None:
    rng = random.Random(11)
    kinds = [request(seed, num_inference_steps=1 + seed % 4, guidance_scale=(1.0, 5.0)[seed % 2]) for seed in range(8)]
    wanted = alone(family, kinds)
    leaving = set(rng.sample(range(400), 200))
    with batching(family) as (batcher, telemetry):
        tickets: list[Ticket] = []
        for number in range(400):
            wish = PreviewWish(PreviewKind.LATENTS, 1) if number % 5 == 0 else None
            options = {"listener": lambda _: None, "preview": wish} if wish else {}
            tickets.append(submit(batcher, family, kinds[number % 8], **options))
            # Some leave while they wait, some while they are painted, some when they may be done.
            for other in [each for each in leaving if each <= number and rng.random() < 0.05]:
                tickets[other].leave()
                leaving.discard(other)
        for other in leaving:
            tickets[other].leave()
        kept = 0
        for number, ticket in enumerate(tickets):
            try:
                assert_alike(picture(ticket), wanted[number % 8])
                kept += 1
            except Cancelled:
                pass
        assert 200 <= kept < 400
        assert metric(telemetry, "sdxl_cancelled_total") == 400 - kept
        assert metric(telemetry, "sdxl_pending_images") == metric(telemetry, "sdxl_running_images") == 0
        assert places_taken(batcher.queue) == 0
