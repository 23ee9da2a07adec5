"""The loop of steps keeps nobody waiting: the host never waits for the device, and nothing piles up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from app.engine.family import Family
from app.engine.flux import FluxFamily
from app.engine.optimization import Optimization
from app.engine.scheduler_names import NAMES
from app.engine.sdxl import SdxlFamily
from app.engine.weights import load_family
from app.settings import Settings
from tests.integration.stock import mask, picture, resolved
from tests.pretended_gpu import Gpu, GpuTensor, pretended_gpu
from tests.small_models import load_demo, make_refiner
from tests.tiny_flux import make_flux

COMMON: dict[str, Any] = {"prompt": "a red circle on a white background", "seed": 1}


@pytest.fixture(scope="module")
def sdxl() -> SdxlFamily:
    base = load_demo()
    return SdxlFamily(base, make_refiner(base))


def begun(family: Family[Any], **parameters: Any) -> Any:
    request = resolved(family, **COMMON, **parameters)
    return family.begin(request, family.encode(request))


# --- Nobody waits ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def sdxl_on_a_gpu() -> Family[Any]:
    with pretended_gpu():
        return load_family(Settings(model_id="demo", device="cuda", use_refiner=True))


def run(gpu: Gpu, family: Family[Any], **parameters: Any) -> None:
    """Two requests side by side, the second of which comes a step later."""
    requests = [resolved(family, num_inference_steps=steps, **COMMON, **parameters) for steps in (4, 5)]
    conditionings = family.encode_all(requests)
    gpu.waits.clear()
    jobs = [family.begin(*each) for each in zip(requests, conditionings, strict=True)]
    family.step(jobs[:1])
    while left := [job for job in jobs if not job.done]:
        together = [job for job in left if family.signature(job) == family.signature(left[0])]
        family.step(together)
    assert gpu.waits == []
    assert all(type(job.latents) is GpuTensor for job in jobs)
    family.decode(jobs)
    assert [wait.rpartition(" in ")[0] for wait in gpu.waits] == ["reads a tensor"] * 2


@pytest.mark.parametrize("scheduler", NAMES)
def test_no_step_of_sdxl_waits_for_the_device(scheduler: str, gpu: Gpu, sdxl_on_a_gpu: Family[Any]) -> None:
    run(gpu, sdxl_on_a_gpu, scheduler=scheduler, guidance_rescale=0.5, denoising_limit=0.6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"guidance_scale": 1.0},
        {"image": picture(), "strength": 0.8, "denoising_limit": 0.5},
        {"image": picture(), "mask_image": mask(), "denoising_limit": 0.5},
        {"image": picture(), "mask_image": mask(), "denoising_limit": 0.5, "scheduler": "DDIM", "eta": 0.5},
        {"image": picture(), "mask_image": mask(), "denoising_limit": 1.0, "scheduler": "Euler a"},
    ],
)
def test_no_step_of_other_tasks_waits_for_the_device(
    parameters: dict[str, Any], gpu: Gpu, sdxl_on_a_gpu: Family[Any]
) -> None:
    run(gpu, sdxl_on_a_gpu, **parameters)


def test_an_autoencoder_whose_latents_have_a_mean_makes_nobody_wait(gpu: Gpu) -> None:
    family: Any = load_family(Settings(model_id="demo", device="cuda"))
    family._base.vae.module.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.3] * 4)
    run(gpu, family, image=picture(), strength=0.8)


@pytest.mark.parametrize("step_cache", [1, 2])
@pytest.mark.parametrize(
    "parameters", [{}, {"scheduler": "Heun"}, {"image": picture(), "mask_image": mask(), "strength": 0.9}]
)
def test_no_step_of_flux_waits_for_the_device(parameters: dict[str, Any], step_cache: int, gpu: Gpu) -> None:
    pipeline = make_flux(guidance_embeds=True, use_dynamic_shifting=True)
    with torch.inference_mode():
        pipeline.to("cuda")
    family = FluxFamily(pipeline, optimization=Optimization("safe", step_cache=step_cache))
    run(gpu, family, true_cfg_scale=2.0, negative_prompt="blue", **parameters)


# --- Nothing piles up ------------------------------------------------------------------------------------------


def test_a_profile_of_the_loop_shows_the_same_in_every_step(sdxl: SdxlFamily) -> None:
    job = begun(sdxl, num_inference_steps=8, denoising_limit=1.0)
    sdxl.step([job])
    steps = []
    for _ in range(5):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            sdxl.step([job])
        steps.append({event.key: event.count for event in found.key_averages() if event.key.startswith("aten::")})
    assert steps[0].get("aten::conv2d", 0) > 0
    assert steps[1:] == steps[:-1]
    # What the host asks for are the scheduler's own numbers, which are on the host: a handful of them.
    assert steps[0].get("aten::nonzero", 0) == 0
    assert steps[0].get("aten::_local_scalar_dense", 0) <= 4


def living() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    # What compiling leaves behind has shapes and no memory.
    tensors = [each for each in tensors if not issubclass(type(each), FakeTensor)]
    return len(tensors), sum(each.nbytes for each in tensors)


@pytest.mark.parametrize("scheduler", ["Euler", "DPM++ 2M", "LMS", "UniPC"])
def test_nothing_piles_up_from_step_to_step(scheduler: str, sdxl: SdxlFamily) -> None:
    size = {"width": 64, "height": 64}
    job = begun(sdxl, num_inference_steps=40, scheduler=scheduler, denoising_limit=1.0, **size)
    alive = []
    while not job.done:
        sdxl.step([job])
        if job.step_index in (8, 38):
            alive.append(living())
    assert alive[0] == alive[1]
