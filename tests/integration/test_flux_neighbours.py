"""Neighbours don't matter to FLUX either: a request gives the same picture alone and in any company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.batcher import Batcher
from app.engine.flux import FluxFamily
from app.generation import GeneratedImage, GenerateRequest, Pixels
from app.telemetry import Telemetry
from tests.tiny_flux import make_flux

WAIT = 300.0


def sixteen_requests() -> list[GenerateRequest]:
    """Of every kind, in one size."""
    rng = random.Random(3)
    noise = np.random.default_rng(3)

    def picture(*shape: int) -> Pixels:
        return Pixels(noise.integers(0, 256, shape, np.uint8).tobytes(), shape[0], shape[1], (*shape, 1)[2])

    requests = []
    for i in range(16):
        extra: dict[str, Any] = {}
        if i % 4 >= 2:
            extra |= {"image": picture(64, 64, 3), "strength": rng.choice((0.4, 0.8, 1.0))}
        if i % 4 == 3:
            extra |= {"mask_image": picture(64, 64)}
        if i % 3 == 1:
            extra |= {"true_cfg_scale": rng.choice((2.0, 4.0)), "negative_prompt": rng.choice(("", "blue"))}
        requests.append(
            GenerateRequest(
                prompt=f"a {rng.choice(('red', 'blue'))} {rng.choice(('star', 'cross'))}",
                height=64,
                width=64,
                seed=rng.randrange(2**32),
                num_inference_steps=rng.randrange(2, 9),
                guidance_scale=rng.choice((1.0, 3.5, 7.0)),
                scheduler=rng.choice((None, "Euler", "Heun")) if i % 5 else None,
                use_karras_sigmas=None if i % 5 else True,
                max_sequence_length=64,
                **extra,
            )
        )
    return requests


def paint(family: FluxFamily, batches: list[list[GenerateRequest]]) -> list[GeneratedImage]:
    """Every list at once, one list after the other."""
    batcher = Batcher(
        lambda: family,
        Telemetry("flux"),
        max_queue=64,
        max_batch_size=32,
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


@pytest.fixture(scope="module", params=["dev", "schnell"])
def family(request: pytest.FixtureRequest) -> FluxFamily:
    dev = request.param == "dev"
    return FluxFamily(make_flux(guidance_embeds=dev, use_dynamic_shifting=dev))


@pytest.fixture
def passes(family: FluxFamily) -> Iterator[list[int]]:
    """The rows of every forward pass."""
    seen: list[int] = []

    def count(_: torch.nn.Module, __: object, options: dict[str, Any]) -> None:
        seen.append(len(options["hidden_states"]))

    handle = family._transformer.register_forward_pre_hook(count, with_kwargs=True)
    yield seen
    handle.remove()


def test_sixteen_different_requests_at_once_give_the_pictures_that_each_gives_alone(
    family: FluxFamily, passes: list[int]
) -> None:
    alone = paint(family, [[request] for request in sixteen_requests()])
    assert set(passes) == {1}
    rows = len(passes)
    passes.clear()

    together = paint(family, [sixteen_requests()])
    for one, other in zip(alone, together, strict=True):
        difference = np.frombuffer(one.pixels.data, np.uint8).astype(int) - np.frombuffer(other.pixels.data, np.uint8)
        assert np.abs(difference).max() <= 2
    assert sum(passes) == rows
    assert len(passes) <= rows / 4, "forward passes were hardly shared"


def test_requests_of_other_sizes_and_lengths_take_passes_of_their_own(family: FluxFamily, passes: list[int]) -> None:
    common: dict[str, Any] = {"prompt": "p", "seed": 1, "num_inference_steps": 2, "max_sequence_length": 64}
    requests = [
        GenerateRequest(height=32, width=64, **common),
        GenerateRequest(height=64, width=32, **common),
        GenerateRequest(height=32, width=64, **{**common, "max_sequence_length": 32}),
    ]
    resolved = [family.resolve(request) for request in requests]
    jobs = [family.begin(request, family.encode(request)) for request in resolved]
    assert len({family.signature(job) for job in jobs}) == 3
    alone, together = paint(family, [[request] for request in requests]), paint(family, [requests])
    assert [image.encoded for image in alone] == [image.encoded for image in together]


def test_a_request_gives_the_same_bytes_again(family: FluxFamily) -> None:
    first = paint(family, [[request] for request in sixteen_requests()[:4]])
    again = paint(family, [[request] for request in sixteen_requests()[:4]])
    assert [image.encoded for image in first] == [image.encoded for image in again]
