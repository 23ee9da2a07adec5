"""The loop of steps keeps nobody waiting: the host never asks the device for a number, and nothing piles up.

Tensors on the meta device, which have a shape but no numbers, go through the real code of a step: whatever wants to
know one of their numbers fails, and what would bring numbers over is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.family import Family
from app.engine.flux import FluxFamily
from app.engine.scheduler_names import NAMES
from app.engine.sdxl import SdxlFamily
from app.generation import GenerateRequest
from app.images import decode_images
from tests.integration.stock import mask, picture, png
from tests.small_models import load_demo, make_refiner
from tests.tiny_flux import make_flux

PROMPT = "a red circle on a white background"
DEVICE = torch.device("meta")


class Waiting(Exception):
    """Something had to wait for the device."""


class Watch(TorchDispatchMode):
    """Refuses whatever brings numbers from the device to the host, or from the host to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (_devices(each) for each in ((args, kwargs), result))
        if func in CROSSING and len(given | made) > 1:
            raise Waiting(f"{func} between {given} and {made}")
        return result


CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def _devices(tree: Any) -> set[torch.device]:
    return {leaf.device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def onto(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device=DEVICE)


@pytest.fixture(scope="module")
def sdxl() -> SdxlFamily:
    base = load_demo()
    return SdxlFamily(base, make_refiner(base))


def begun(family: Family[Any], **parameters: Any) -> Any:
    for name in ("image", "mask_image"):
        if name in parameters:
            (parameters[name],) = decode_images([(name, png(parameters[name]))], 10**7)
    request = family.resolve(GenerateRequest(prompt=PROMPT, seed=1, **parameters))
    return family.begin(request, family.encode(request))


def send(job: Any) -> None:
    """Everything that `SdxlFamily.begin` puts on the device."""
    for leg in job.legs:
        leg.part = copy.copy(leg.part)
        leg.part.predict = copy.deepcopy(leg.part.unet).to(DEVICE)
        for name in ("timesteps", "embeddings", "pooled", "time_ids"):
            setattr(leg, name, onto(getattr(leg, name)))
        if leg.kept is not None:
            leg.kept = tuple(onto(part) for part in leg.kept)
    job.latents, job.guidance = onto(job.latents), onto(job.guidance)
    if job.rescale is not None:
        job.rescale = tuple(onto(part) for part in job.rescale)
    if job.inpainting is not None:
        kept = {name: getattr(job.inpainting, name) for name in ("mask", "image_latents", "noise", "masked_latents")}
        fakes = {name: None if tensor is None else onto(tensor) for name, tensor in kept.items()}
        job.inpainting = dataclasses.replace(job.inpainting, **fakes)


def run(family: Family[Any], job: Any) -> None:
    with Watch():
        while not job.done:
            family.step([job])
    assert job.latents.device == DEVICE


@pytest.fixture
def noise_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise that some schedulers add in each step is drawn on the host, so that a seed means the same picture on
    every device. That it is sent over is the one thing that the host has to do for the device."""

    def drawn(shape: Any, *_: Any, **options: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=options.get("dtype"), device=DEVICE)

    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.") and hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", drawn)


def test_whatever_waits_is_found() -> None:
    tensor = torch.empty(2, device=DEVICE)
    with Watch():
        with pytest.raises(RuntimeError):
            tensor[0].item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            bool(tensor[0] > 0)
        with pytest.raises(Waiting):
            torch.ones(2).to(DEVICE)


# DPM++ SDE draws from a tree of random numbers that lives on the host.
@pytest.mark.usefixtures("noise_on_the_device")
@pytest.mark.parametrize("scheduler", [name for name in NAMES if not name.startswith("DPM++ SDE")])
def test_no_step_of_sdxl_waits_for_the_device(scheduler: str, sdxl: SdxlFamily) -> None:
    job = begun(sdxl, num_inference_steps=4, scheduler=scheduler, guidance_rescale=0.5, denoising_limit=1.0)
    send(job)
    run(sdxl, job)


@pytest.mark.usefixtures("noise_on_the_device")
@pytest.mark.parametrize(
    "parameters",
    [
        {"denoising_limit": 0.5},
        {"image": picture(), "strength": 0.8, "denoising_limit": 0.5},
        {"image": picture(), "mask_image": mask(), "denoising_limit": 1.0},
        {"image": picture(), "mask_image": mask(), "denoising_limit": 1.0, "scheduler": "DDIM"},
    ],
)
def test_no_step_of_other_tasks_waits_for_the_device(parameters: dict[str, Any], sdxl: SdxlFamily) -> None:
    job = begun(sdxl, num_inference_steps=4, **parameters)
    send(job)
    run(sdxl, job)


@pytest.mark.parametrize("parameters", [{}, {"image": picture(), "mask_image": mask(), "strength": 0.9}])
def test_no_step_of_flux_waits_for_the_device(parameters: dict[str, Any]) -> None:
    family = FluxFamily(make_flux(guidance_embeds=True, use_dynamic_shifting=True))
    job = begun(family, num_inference_steps=4, true_cfg_scale=2.0, negative_prompt="blue", **parameters)
    family._predict_rows = copy.deepcopy(family._transformer).to(DEVICE)
    for name in ("latents", "timesteps", "guidance", "image_ids"):
        setattr(job, name, onto(getattr(job, name)))
    sides = [
        dataclasses.replace(side, hidden=onto(side.hidden), pooled=onto(side.pooled), ids=onto(side.ids))
        for side in (job.conditioning.positive, job.conditioning.negative)
    ]
    job.conditioning = dataclasses.replace(job.conditioning, positive=sides[0], negative=sides[1])
    if job.kept is not None:
        kept = {name: onto(getattr(job.kept, name)) for name in ("latents", "noise", "mask", "noise_levels")}
        job.kept = dataclasses.replace(job.kept, **kept)
    run(family, job)


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
    job = begun(sdxl, num_inference_steps=40, scheduler=scheduler, denoising_limit=1.0)
    alive = []
    while not job.done:
        sdxl.step([job])
        if job.step_index in (8, 38):
            alive.append(living())
    assert alive[0] == alive[1]
