"""On a GPU as on a CPU: the same pictures, wherever weights wait, and whenever memory ends."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from app.engine import weights
from app.engine.family import Family
from app.engine.placement import OFFLOADS
from app.engine.weights import load_family
from app.errors import OutOfMemory
from app.settings import Settings
from tests.integration.stock import mask, ours, picture, psnr, resolved
from tests.integration.test_app import INFER, metric, prompt, running
from tests.pretended_gpu import DEVICE, Gpu, GpuTensor, Mismatch, pretended_gpu

COMMON: dict[str, Any] = {"prompt": "a red ring on a black background", "num_inference_steps": 4, "seed": 9}
LONG = "a (red)1.4 ring on a black background, " * 12
SDXL: list[dict[str, Any]] = [
    {},
    {"prompt": LONG, "negative_prompt": "a (blue)0.5 ring", "denoising_limit": 0.5},
    {"image": picture(), "strength": 0.8, "guidance_rescale": 0.5, "scheduler": "DPM++ 2M"},
    {"image": picture(), "mask_image": mask(), "denoising_limit": 0.5},
    {"image": picture(), "mask_image": mask(), "scheduler": "DDIM"},
]
FLUX: list[dict[str, Any]] = [
    {"true_cfg_scale": 2.0, "negative_prompt": "blue"},
    {"image": picture(), "mask_image": mask(), "strength": 0.9},
]
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sdxl": ({"use_refiner": True}, SDXL),
    "flux": ({"model_type": "flux"}, FLUX),
}


def load(**settings: Any) -> Family[Any]:
    return load_family(Settings(model_id="demo", **{"dtype": "float32", **settings}))


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as pretended:
        yield pretended


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[tuple[dict[str, Any], np.ndarray]]]:
    """What loads a model, and what a CPU paints with it."""
    settings, cases = MODELS[request.param]
    family = load(device="cpu", **settings)
    return settings, [(case, ours(family, **{**COMMON, **case})) for case in cases]


# --- The pretended GPU itself ----------------------------------------------------------------------------------


def test_what_goes_wrong_on_a_gpu_goes_wrong(gpu: Gpu) -> None:
    here = torch.ones(2, device=DEVICE)
    assert isinstance(here, GpuTensor)
    assert (here + here + 1).tolist() == [3, 3]
    with torch.inference_mode(), pytest.raises(Mismatch):
        here + torch.ones(2)
    with torch.inference_mode(), pytest.raises(Mismatch):
        torch.nn.functional.linear(torch.ones(1, 2), here[None])


@pytest.mark.parametrize(
    ("waits", "what"),
    [
        (True, lambda here: here.sum().item()),
        (True, lambda here: bool(here[0] > 0)),
        (True, lambda here: here.cpu()),
        (True, lambda here: here[here > 0]),
        (True, lambda here: torch.linalg.solve(here.diag(), here)),
        (False, lambda here: torch.linalg.solve_ex(here.diag(), here)),
        (True, lambda here: torch.ones(2).to(DEVICE)),
        (True, lambda here: torch.ones(2).to(DEVICE, non_blocking=True)),
        (False, lambda here: torch.ones(2).pin_memory().to(DEVICE, non_blocking=True)),
        (False, lambda here: here * torch.tensor(2.0) + here[torch.tensor(1)]),
        (False, lambda here: here.to(torch.float16)),
    ],
)
def test_the_host_waits_as_for_a_gpu(waits: bool, what: Any, gpu: Gpu) -> None:
    with torch.inference_mode():
        here = torch.ones(2, device=DEVICE)
        what(here)
    assert bool(gpu.waits) == waits


@pytest.mark.parametrize(
    ("kind", "part", "kernel"),
    [("flux", "transformer", SDPBackend.CUDNN_ATTENTION), ("sdxl", "unet", SDPBackend.FLASH_ATTENTION)],
)
def test_attention_by_cudnn_where_each_picture_gains_as_much_as_its_plan_takes(
    kind: str, part: str, kernel: SDPBackend, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    family: Any = load(device="cuda", model_type=kind)
    first = set()
    getattr(family._pipeline, part).register_forward_pre_hook(
        lambda *_: first.add(_cur_sdpa_kernel_backends(with_priority=True)[0])
    )
    ours(family, **COMMON)
    assert first == {kernel}


# --- The same pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", *OFFLOADS])
def test_a_gpu_gets_all_that_it_needs_and_nothing_else(model: Any, device: str, gpu: Gpu) -> None:
    settings, cases = model
    family = load(device=device, optimize="off", **settings)
    for case, expected in cases:
        assert np.array_equal(ours(family, **{**COMMON, **case}), expected), case


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_gpu_does_by_itself_paints_the_same(model: Any, dtype: str, gpu: Gpu) -> None:
    settings, cases = model
    family = load(device="auto", dtype=dtype, **settings)
    for case, expected in cases:
        # In half precision a small model's colours may be some shades off.
        assert psnr(ours(family, **{**COMMON, **case}), expected) > (60 if dtype == "float32" else 30), case


@pytest.mark.parametrize("device", ["cuda", "enable_group_offload"])
def test_weights_in_8_bits_go_where_they_are_wanted(device: str, gpu: Gpu) -> None:
    """As they do on a CPU."""
    family = load(device=device, quantization="fp8", optimize="off")
    expected = ours(load(device="cpu", quantization="fp8"), **COMMON)
    assert np.array_equal(ours(family, **COMMON), expected)


@pytest.mark.parametrize("scheduler", ["DPM++ SDE", "Euler a", "DDPM"])
def test_a_seed_means_the_same_noise_on_every_device(scheduler: str, gpu: Gpu) -> None:
    one = ours(load(device="cuda", optimize="off"), **COMMON, scheduler=scheduler)
    assert np.array_equal(one, ours(load(device="cpu"), **COMMON, scheduler=scheduler))


# --- The server ------------------------------------------------------------------------------------------------


async def test_the_server_paints_on_a_gpu_whose_memory_ends_now_and_then(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load_family", on_its_thread(gpu, load_family))
    requests = [{**COMMON, "num_inference_steps": 3 + seed, "seed": seed} for seed in range(4)]
    requests += [{**COMMON, **case, "seed": seed} for seed, case in enumerate(SDXL[:2], start=4)]
    requests += [{**COMMON, "width": 192, "height": 128, "scheduler": "DPM++ SDE"}]
    family = load(device="cpu", use_refiner=True)
    expected = [ours(family, **request) for request in requests]
    options: dict[str, Any] = {"model_id": "demo", "use_refiner": True, "device": "cuda", "warm_up": True}
    async with running(None, **options, dtype="float32", optimize="off") as client:
        bodies = [prompt(request.pop("prompt"), **request) for request in requests]
        asked = [asyncio.create_task(client.post(INFER, json=body)) for body in bodies]
        chance = random.Random(5)
        while not all(task.done() for task in asked):
            await asyncio.sleep(0.02)
            # A pass takes about a thousand: whatever is tried again goes through.
            gpu.full_at = gpu.full_at or gpu.operations + chance.randint(3000, 6000)
        for task, picture in zip(asked, expected, strict=True):
            answer = task.result()
            assert answer.status_code == 200, answer.text
            (encoded,) = answer.json()["outputs"][0]["data"]
            painted = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
            assert np.abs(painted.astype(int) - picture).max() <= 2
        counted = (await client.get("/metrics")).text
    assert metric(counted, "sdxl_out_of_memory_total") > 0


def on_its_thread(gpu: Gpu, load: Any) -> Any:
    """`load`, after which the thread that called it has the GPU."""

    def wrapper(*args: Any) -> Any:
        gpu.__enter__()
        return load(*args)

    return wrapper


# --- Memory that ends ------------------------------------------------------------------------------------------


def stages(family: Family[Any], request: Any) -> Iterator[Any]:
    """One request's way, a piece at a time: each a function that may be called again, and leaves the same behind."""
    held: dict[str, Any] = {}

    def encode() -> None:
        held["conditioning"] = family.encode(request)

    def begin() -> None:
        held["job"] = family.begin(request, held["conditioning"])

    yield encode
    yield begin
    while not held["job"].done:
        before = held["job"].step_index

        def step(before: int = before) -> None:
            if held["job"].step_index == before:
                family.step([held["job"]])

        yield step
        yield lambda: family.preview(held["job"])

    yield lambda: family.decode([held["job"]])[0]


def interrupted(gpu: Gpu, settings: dict[str, Any], **parameters: Any) -> None:
    """Each piece of the way is tried with memory that ends somewhere, until it goes through."""
    expected = ours(load(**{**settings, "device": "cpu"}), **COMMON, **parameters)
    family = load(optimize="off", **settings)
    chance, full = random.Random(3), 0
    for stage in stages(family, resolved(family, **COMMON, **parameters)):
        for most in (1000, 200, 20):
            gpu.full_at = gpu.operations + chance.randint(1, most)
            try:
                stage()
            except OutOfMemory:
                full += 1
        gpu.full_at = None
        picture = stage()
    assert full > 10
    assert np.array_equal(picture, expected)
    assert np.array_equal(ours(family, **COMMON, **parameters), expected)


INPAINTING: dict[str, Any] = {"image": picture(), "mask_image": mask()}


@pytest.mark.parametrize("scheduler", ["Euler a", "UniPC", "PNDM", "DPM2 a"])
def test_wherever_memory_ends_the_picture_stays_the_same(scheduler: str, gpu: Gpu) -> None:
    refined = {"device": "cuda", "use_refiner": True}
    interrupted(gpu, refined, scheduler=scheduler, denoising_limit=0.5, **INPAINTING)


@pytest.mark.parametrize("device", OFFLOADS)
def test_wherever_memory_ends_while_weights_move_the_picture_stays_the_same(device: str, gpu: Gpu) -> None:
    interrupted(gpu, {"device": device, "use_refiner": True}, negative_prompt=LONG, denoising_limit=0.5)


def test_wherever_memory_ends_flux_paints_the_same(gpu: Gpu) -> None:
    interrupted(gpu, {"device": "cuda", "model_type": "flux"}, true_cfg_scale=2.0, **INPAINTING)


def held() -> int:
    """Bytes on the device."""
    return sum(each.numbers.nbytes for each in gc.get_objects() if type(each) is GpuTensor)


def test_what_did_not_fit_leaves_nothing_behind(gpu: Gpu) -> None:
    family = load(device="cuda")
    request = resolved(family, **COMMON)
    job = family.begin(request, family.encode(request))
    for stage in (lambda: family.step([job]), lambda: family.decode([job]), lambda: family.preview(job)):
        stage()
        before = held()
        gpu.full_at = gpu.operations + 50
        with pytest.raises(OutOfMemory):
            stage()
        assert held() == before
