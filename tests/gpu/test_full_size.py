"""Full-size models of random weights through the engine, on a GPU: seconds of each stage, and the peak of memory.

Nothing is downloaded. ``pytest -m gpu --numprocesses 0 -s tests/gpu`` prints the figures. Where there is no GPU, the
same code runs on the demo's small configurations, and the full-size ones are made without weights.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from app.engine.family import Family
from app.engine.placement import Placement, place, store_as_fp8
from app.engine.single_files import CONFIGS
from app.engine.weights import DEMO_WEIGHTS
from app.generation import GenerateRequest
from tests.gpu.full_size import assemble, count_parameters, make_components, make_models, modules

FULL_SIZE = {
    "sdxl": ("sdxl-base",),
    "sdxl with refiner": ("sdxl-base", "sdxl-refiner"),
    "flux dev": ("flux-dev",),
    "flux schnell": ("flux-schnell",),
}
MODES = {
    "cuda": (None, "none"),
    "fp8": (None, "fp8"),
    "enable_model_cpu_offload": ("enable_model_cpu_offload", "none"),
    "enable_sequential_cpu_offload": ("enable_sequential_cpu_offload", "none"),
    "enable_group_offload": ("enable_group_offload", "none"),
}
STEPS = 4
R = TypeVar("R")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here")


@dataclass
class Figures:
    """Seconds of each stage, and GiB."""

    encode: float
    begin: float
    first_step: float
    step: float
    decode: float
    memory: float

    def __str__(self) -> str:
        return (
            f"encode {self.encode:.3f} s, begin {self.begin:.3f} s, first step {self.first_step:.3f} s, "
            f"step {self.step:.3f} s, decode {self.decode:.3f} s, peak {self.memory:.1f} GiB"
        )


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU where there is one, empty before and after."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    yield device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_family(
    folders: list[Path], device: torch.device, dtype: torch.dtype, offload: str | None, quantization: str
) -> Family[Any]:
    """As `app.engine.weights` puts one together, but for the weights."""
    made = make_models(folders, device, dtype)
    parts = modules(made)
    if quantization == "fp8":
        for name, part in parts.items():
            if name.startswith(("unet", "transformer")):
                store_as_fp8(part, dtype)
    if offload is not None:
        for part in parts.values():
            part.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
    place(parts, Placement(device, dtype, offload, quantization), lambda _: None)
    return assemble(made)


def measure(family: Family[Any], request: GenerateRequest, device: torch.device) -> tuple[Figures, np.ndarray]:
    """One picture through all stages, after another of another prompt that paid for first times."""
    paint(family, replace(request, prompt="another"), device)
    return paint(family, request, device)


def paint(family: Family[Any], request: GenerateRequest, device: torch.device) -> tuple[Figures, np.ndarray]:
    def timed(work: Callable[..., R], *arguments: Any) -> tuple[R, float]:
        started = time.perf_counter()
        result = work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result, time.perf_counter() - started

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    resolved = family.resolve(request)
    conditioning, encode = timed(family.encode, resolved)
    job, begin = timed(family.begin, resolved, conditioning)
    steps = []
    while not job.done:
        steps.append(timed(family.step, [job])[1])
    pixels, decode = timed(family.decode, [job])
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return Figures(encode, begin, steps[0], statistics.median(steps), decode, memory), pixels


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", FULL_SIZE)
def test_a_full_size_model_paints_in_every_device_mode(model: str, mode: str, device: torch.device) -> None:
    family = make_family([CONFIGS / name for name in FULL_SIZE[model]], device, torch.bfloat16, *MODES[mode])
    request = GenerateRequest(prompt="a red star", seed=1, height=1024, width=1024, num_inference_steps=STEPS)
    figures, pixels = measure(family, request, device)
    print(f"\n{torch.cuda.get_device_name(device)}, {model}, {mode}: {figures}")
    assert pixels.shape == (1, 1024, 1024, 3)
    assert pixels.std() > 0


@pytest.mark.parametrize(
    ("folders", "quantization"),
    [([DEMO_WEIGHTS / "sdxl"], "none"), ([DEMO_WEIGHTS / "sdxl"], "fp8")],
)
def test_the_measuring_works_on_small_configurations(
    folders: list[Path], quantization: str, device: torch.device
) -> None:
    family = make_family(folders, device, torch.float32, None, quantization)
    request = GenerateRequest(prompt="a red star", seed=1, height=128, width=128, num_inference_steps=2)
    figures, pixels = measure(family, request, device)
    assert pixels.shape == (1, 128, 128, 3) and pixels.std() > 0
    assert "peak" in str(figures)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sdxl-base", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
        ("sdxl-refiner", {"unet": 2_259_526_660, "text_encoder_2": 694_659_840, "vae": 83_653_863}),
        ("flux-dev", {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}),
        ("flux-schnell", {"transformer": 11_891_178_560, "text_encoder": 123_060_480}),
    ],
)
def test_full_size_models_have_as_many_parameters_as_the_published_ones(name: str, parameters: dict[str, int]) -> None:
    counted = count_parameters(make_components(CONFIGS / name, torch.device("meta"), torch.bfloat16))
    assert {part: counted[part] for part in parameters} == parameters
