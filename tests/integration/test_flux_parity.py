"""Alone, a FLUX request gives the picture that the stock pipelines' ``__call__`` gives: on the CPU, every pixel."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.flux import FluxFamily
from app.engine.flux_job import FluxJob
from app.errors import GenerationFailed, OutOfMemory
from app.generation import GenerateRequest
from app.images import decode_images
from tests.integration.stock import mask, ours, picture, png, theirs
from tests.integration.test_half_precision import Overflowing
from tests.tiny_flux import make_flux

PROMPT = "a small red star on a white background"
SIZE = {"height": 64, "width": 64}
PICTURE, MASK = decode_images((("image", png(picture(64, 64))), ("mask_image", png(mask(64, 64)))), 10**7)
SHORT: dict[str, Any] = {**SIZE, "num_inference_steps": 3, "max_sequence_length": 64}


@dataclass(frozen=True)
class Pair:
    """Our family and the stock pipelines over the same weights."""

    family: FluxFamily
    stock: FluxPipeline

    def ours(self, **parameters: Any) -> np.ndarray:
        return ours(self.family, **parameters)

    def theirs(self, seed: int, **parameters: Any) -> np.ndarray:
        pipeline = self.stock
        if "image" in parameters:
            wanted = FluxInpaintPipeline if "mask_image" in parameters else FluxImg2ImgPipeline
            pipeline = wanted(**self.stock.components)
            pipeline.set_progress_bar_config(disable=True)
        if "sigmas" in parameters:
            parameters["sigmas"] = list(parameters["sigmas"])
        return theirs(pipeline, seed, **parameters)

    def agree(self, seed: int, **parameters: Any) -> bool:
        return np.array_equal(self.ours(seed=seed, **parameters), self.theirs(seed, **parameters))


def finish(family: FluxFamily, **parameters: Any) -> FluxJob:
    request = family.resolve(GenerateRequest(**parameters))
    job = family.begin(request, family.encode(request))
    while not job.done:
        family.step([job])
    return job


@pytest.fixture(scope="module", params=["dev", "schnell"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    dev = request.param == "dev"
    stock = make_flux(guidance_embeds=dev, use_dynamic_shifting=dev)
    stock.set_progress_bar_config(disable=True)
    yield Pair(FluxFamily(make_flux(guidance_embeds=dev, use_dynamic_shifting=dev)), stock)


@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "guidance"),
    [
        ("a red circle on a white background", 0, 4, 3.5),
        ("a large blue square on a yellow background", 1, 1, 0.0),
        ("a purple star on a orange background", 2**40 + 5, 5, 1.0),
        ("", 2**63 - 1, 2, 7.0),
        ("words that it never saw: zebra, 日本, émoji 🎨", 7, 3, 30.0),
        ("red " * 90, 9, 2, 3.5),
    ],
)
def test_a_solo_request_equals_the_stock_call_in_every_pixel(
    pair: Pair, prompt: str, seed: int, steps: int, guidance: float
) -> None:
    assert pair.agree(seed, prompt=prompt, num_inference_steps=steps, guidance_scale=guidance, **SIZE)


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"prompt_2": "a green ring on a black background"}, id="prompt_2"),
        pytest.param({"true_cfg_scale": 4.0, "negative_prompt": "blue"}, id="true_cfg_scale"),
        pytest.param({"true_cfg_scale": 4.0, "negative_prompt": ""}, id="empty-negative_prompt"),
        pytest.param(
            {"true_cfg_scale": 2.5, "negative_prompt": "blue", "negative_prompt_2": "circle"}, id="negative_prompt_2"
        ),
        pytest.param({"true_cfg_scale": 2.5, "negative_prompt_2": "circle"}, id="negative_prompt_2-alone"),
        pytest.param({"true_cfg_scale": 4.0}, id="true_cfg_scale-alone"),
        pytest.param({"negative_prompt": "blue"}, id="negative_prompt-alone"),
        pytest.param({"max_sequence_length": 256}, id="max_sequence_length"),
        pytest.param({"num_inference_steps": 3, "sigmas": (1.0, 0.7, 0.2)}, id="sigmas"),
        pytest.param({"height": 48, "width": 112}, id="landscape"),
        pytest.param({"height": 16, "width": 16}, id="smallest"),
        pytest.param({"height": 304, "width": 256}, id="more-tokens-than-the-shift-begins-at"),
    ],
)
def test_every_parameter_means_what_it_means_to_the_stock_call(pair: Pair, parameters: dict[str, Any]) -> None:
    assert pair.agree(11, prompt=PROMPT, **{**SHORT, **parameters})


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"strength": 1.0}, id="strength-1"),
        pytest.param({"strength": 0.01}, id="strength-almost-0"),
        pytest.param({"num_inference_steps": 7, "strength": 0.45, "guidance_scale": 2.0}, id="strength-0.45"),
        pytest.param({"true_cfg_scale": 3.0, "negative_prompt": "blue"}, id="true_cfg_scale"),
        pytest.param({"num_inference_steps": 3, "sigmas": (1.0, 0.7, 0.2)}, id="sigmas"),
        pytest.param({"height": 96, "width": 48}, id="resized"),
    ],
)
@pytest.mark.parametrize("inpaint", [False, True], ids=["image-to-image", "inpaint"])
def test_a_picture_to_start_from_means_what_it_means_to_the_stock_calls(
    pair: Pair, parameters: dict[str, Any], inpaint: bool
) -> None:
    images = {"image": picture(64, 64)} | ({"mask_image": mask(64, 64)} if inpaint else {})
    assert pair.agree(13, prompt=PROMPT, **images, **{**SHORT, "num_inference_steps": 4, **parameters})


def test_a_mask_is_resized_and_made_black_and_white_as_the_stock_call_does(pair: Pair) -> None:
    soft = Image.linear_gradient("L").resize((100, 80))
    assert pair.agree(3, prompt=PROMPT, image=picture(64, 64), mask_image=soft, **SHORT)
    assert pair.agree(3, prompt=PROMPT, image=picture(64, 64), mask_image=soft.convert("RGB"), **SHORT)


def test_a_mask_of_black_keeps_the_image(pair: Pair) -> None:
    black = Image.new("L", (64, 64))
    kept = pair.ours(prompt=PROMPT, seed=1, image=PICTURE, mask_image=black, strength=1.0, **SHORT)
    other = pair.ours(prompt="blue", seed=1, image=PICTURE, mask_image=black, strength=1.0, **SHORT)
    assert np.array_equal(kept, other)


def test_several_pictures_of_one_request_are_those_of_its_seed_and_the_next(pair: Pair) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (21, 22)]
    expected = pair.stock(prompt=PROMPT, num_images_per_prompt=2, generator=seeds, **SHORT).images
    resolved = [pair.family.resolve(GenerateRequest(prompt=PROMPT, seed=seed, **SHORT)) for seed in (21, 22)]
    jobs = [pair.family.begin(request, pair.family.encode(request)) for request in resolved]
    while not jobs[0].done:
        pair.family.step(jobs)
    # The stock call rounds as two do, ours as each does alone.
    found, both = pair.family.decode(jobs).astype(int), np.stack([np.asarray(image) for image in expected])
    assert np.abs(found - both).max() <= 1
    for latents, request in zip([job.latents for job in jobs], resolved, strict=True):
        job = pair.family.begin(request, pair.family.encode(request))
        while not job.done:
            pair.family.step([job])
        assert torch.equal(job.latents, latents)


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("own", [None, "use_karras_sigmas"])
def test_spacings_equal_the_stock_call_with_such_a_scheduler(name: str, own: str | None) -> None:
    pair = Pair(FluxFamily(make_flux()), make_flux())
    if own:
        pair.family._schedulers._config = FlowMatchEulerDiscreteScheduler.from_config(
            pair.stock.scheduler.config, **{own: True}
        ).config
    pair.stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pair.stock.scheduler.config, **{name: True})
    expected = pair.theirs(5, prompt=PROMPT, **SHORT)
    assert np.array_equal(pair.ours(prompt=PROMPT, seed=5, **{name: True}, **SHORT), expected)


def test_heun_comes_to_the_picture_that_euler_comes_to_with_many_steps(pair: Pair) -> None:
    many = {"prompt": PROMPT, "seed": 3, **SHORT, "num_inference_steps": 150}
    euler = pair.ours(scheduler="Euler", **many).astype(int)
    heun = pair.ours(scheduler="Heun", **many).astype(int)
    few = pair.ours(scheduler="Euler", **{**many, "num_inference_steps": 3}).astype(int)
    assert np.abs(heun - euler).mean() < 0.1 * np.abs(few - euler).mean()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("start", [{}, {"image": True}, {"image": True, "mask_image": True}])
def test_heun_paints_at_few_steps_from_noise_and_from_pictures(pair: Pair, steps: int, start: dict[str, bool]) -> None:
    drawn = {"image": PICTURE, "mask_image": MASK}
    images = {name: drawn[name] for name in start}
    many = {**SHORT, "num_inference_steps": steps}
    job = finish(pair.family, prompt=PROMPT, seed=1, scheduler="Heun", **images, **many)
    assert job.num_steps == 2 * (steps if not start else min(steps, -int(-steps * 0.6 // 1))) - 1
    assert pair.family.decode([job])[0].std() > 10


def test_prompts_are_encoded_once_and_few_are_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FluxFamily(pair.stock)
    encoded: list[str] = []

    def follow(encoder: str) -> None:
        real = getattr(family._pipeline, f"_get_{encoder}_prompt_embeds")

        def followed(prompt: str, **options: Any) -> Any:
            encoded.append(f"{encoder} {prompt}")
            return real(prompt, **options)

        monkeypatch.setattr(family._pipeline, f"_get_{encoder}_prompt_embeds", followed)

    follow("clip")
    follow("t5")
    monkeypatch.setattr("app.engine.flux.EMBEDDING_CACHE_SIZE", 2)

    def encode(*prompts: str, **parameters: Any) -> list[str]:
        encoded.clear()
        requests = [family.resolve(GenerateRequest(prompt=each, **{**SHORT, **parameters})) for each in prompts]
        assert len(family.encode_all(requests)) == len(prompts)
        return encoded

    assert encode("a") == ["clip a", "t5 a"]
    assert encode("a", "b", "a", "c", "c") == ["clip b", "clip c", "t5 b", "t5 c"], "an encoder came more than once"
    assert encode("b", "c") == []
    assert encode("a") == ["clip a", "t5 a"], "more prompts were kept than there is room for"
    assert encode("a", max_sequence_length=32) == ["clip a", "t5 a"]
    assert encode("a", prompt_2="z") == ["clip a", "t5 z"]
    assert encode("a", prompt_2="z", negative_prompt="n") == []
    negative = encode("a", prompt_2="z", negative_prompt="n", true_cfg_scale=2.0)
    assert negative == ["clip n", "t5 n"]


def test_prompts_read_together_paint_as_each_alone(pair: Pair) -> None:
    requests = [
        pair.family.resolve(GenerateRequest(prompt=prompt, negative_prompt="n", true_cfg_scale=2.0, seed=1, **SHORT))
        for prompt in ("first", "second")
    ]
    together = FluxFamily(pair.stock).encode_all(requests)
    for request, conditioning in zip(requests, together, strict=True):
        job = pair.family.begin(request, conditioning)
        while not job.done:
            pair.family.step([job])
        alone = pair.ours(prompt=request.prompt, negative_prompt="n", true_cfg_scale=2.0, seed=1, **SHORT)
        assert np.array_equal(pair.family.decode([job])[0], alone)


@pytest.mark.parametrize("scheduler", ["Euler", "Heun"])
@pytest.mark.parametrize("inpaint", [False, True])
def test_a_step_that_did_not_fit_leaves_the_job_as_it_was(pair: Pair, scheduler: str, inpaint: bool) -> None:
    images = {"image": PICTURE, "mask_image": MASK, "strength": 1.0} if inpaint else {}
    parameters: dict[str, Any] = {"prompt": PROMPT, "seed": 4, "scheduler": scheduler, **images, **SHORT}
    expected = pair.ours(**parameters)
    request = pair.family.resolve(GenerateRequest(**parameters))
    job = pair.family.begin(request, pair.family.encode(request))
    with MemoryEndsAfter(10**9) as mode:
        pair.family.step([job])
    for operations in range(mode.operations - 16, mode.operations, 3):
        job = pair.family.begin(request, pair.family.encode(request))
        while not job.done:
            before = job.step_index
            with contextlib.suppress(OutOfMemory), MemoryEndsAfter(operations) as mode:
                pair.family.step([job])
            if mode.operations > operations:
                assert job.step_index == before
                pair.family.step([job])
        assert np.array_equal(pair.family.decode([job])[0], expected)


class MemoryEndsAfter(TorchDispatchMode):
    """Lets so many operations through and then says that the device is full."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device_between_steps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    family = pair.family
    requests = [
        GenerateRequest(prompt=PROMPT, seed=1, **SHORT),
        GenerateRequest(prompt=PROMPT, seed=2, true_cfg_scale=3.0, negative_prompt="blue", **SHORT),
        GenerateRequest(prompt=PROMPT, seed=3, image=PICTURE, mask_image=MASK, strength=1.0, **SHORT),
    ]
    resolved = [family.resolve(request) for request in requests]
    jobs = [family.begin(request, family.encode(request)) for request in resolved]

    def read(*_: object) -> None:
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    for _ in range(3):
        family.step(jobs)
    monkeypatch.undo()
    assert all(job.done for job in jobs)


def test_there_is_a_preview_between_any_two_steps(pair: Pair) -> None:
    resolved = pair.family.resolve(GenerateRequest(prompt=PROMPT, seed=1, **{**SHORT, "width": 96}))
    job = pair.family.begin(resolved, pair.family.encode(resolved))
    for _ in range(2):
        preview = pair.family.preview(job)
        assert preview is not None and preview.shape == (64, 96, 3) and preview.dtype == np.uint8
        pair.family.step([job])


def test_numbers_that_are_not_finite_are_an_error_and_never_a_black_picture(pair: Pair) -> None:
    job = finish(pair.family, prompt=PROMPT, seed=1, **SHORT)
    job.latents = job.latents * float("nan")
    with pytest.raises(GenerationFailed, match="not finite"):
        pair.family.decode([job])


def test_a_full_device_is_our_own_error_and_the_next_request_is_painted(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(pair.family._transformer, "forward", full)
        with pytest.raises(OutOfMemory, match="too little memory"):
            pair.ours(prompt=PROMPT, seed=1, **SHORT)
    assert pair.ours(prompt=PROMPT, seed=1, **SHORT).shape == (64, 64, 3)


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, id="text-to-image"),
        pytest.param({"true_cfg_scale": 2.3, "negative_prompt": "blue"}, id="true_cfg_scale"),
        pytest.param({"image": picture(64, 64), "mask_image": mask(64, 64)}, id="inpaint"),
    ],
)
def test_in_half_precision_too_every_pixel_is_that_of_the_stock_call(parameters: dict[str, Any]) -> None:
    pair = Pair(FluxFamily(make_flux().to(dtype=torch.bfloat16)), make_flux().to(dtype=torch.bfloat16))
    pair.stock.set_progress_bar_config(disable=True)
    assert pair.agree(17, prompt=PROMPT, **SHORT, **parameters)


def test_a_spoilt_picture_is_decoded_once_more_in_float32_and_counted(pair: Pair) -> None:
    pipeline = FluxPipeline(**{**pair.stock.components, "vae": copy.deepcopy(pair.stock.vae).to(torch.bfloat16)})
    pipeline.vae.decoder.conv_out = Overflowing(pipeline.vae.decoder.conv_out, float("nan"))
    spoiling = FluxFamily(pipeline)
    parameters: dict[str, Any] = {"prompt": PROMPT, "seed": 1, **SHORT}
    painted = ours(spoiling, **parameters)
    assert spoiling.decode_retries == 1
    # The weights went through bfloat16 once, so the pictures are alike and not equal.
    assert np.abs(painted.astype(int) - pair.ours(**parameters)).mean() < 5
