"""Where weights go: devices, number formats, and parts that wait elsewhere, painting the same wherever they are."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from app.engine import placement
from app.engine.loading import told
from app.engine.placement import OFFLOADS, Placement, choose_placement, place, store_as_fp8
from app.engine.sdxl import SdxlFamily
from app.engine.weights import load_family
from app.errors import ModelLoadFailed
from app.settings import Settings
from tests.integration.stock import ours
from tests.small_models import load_demo, make_refiner

COMMON: dict[str, Any] = {"prompt": "a red ring on a black background", "num_inference_steps": 3, "seed": 9}
CPU = torch.device("cpu")


def parts_of(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_every_kind_of_offloading_paints_the_same_picture_again_and_again(family: SdxlFamily, offload: str) -> None:
    """With the CPU as the device that parts move to and from."""
    pipeline = load_demo()
    refiner = make_refiner(pipeline)
    parts = {**parts_of(pipeline), "refiner's unet": refiner.unet}
    place(parts, Placement(CPU, torch.float32, offload, "none"), lambda _: None)
    moved = SdxlFamily(pipeline, refiner)
    expected = ours(family, **COMMON)
    assert np.array_equal(ours(moved, **COMMON, denoising_limit=1.0), expected)
    refined = ours(moved, **COMMON, denoising_limit=0.5)
    assert not np.array_equal(refined, expected)
    assert np.array_equal(ours(moved, **COMMON, denoising_limit=0.5), refined)
    assert np.array_equal(ours(moved, **COMMON, denoising_limit=1.0), expected)


def test_layers_that_wait_hold_no_memory_on_the_device() -> None:
    pipeline = load_demo()
    place(parts_of(pipeline), Placement(CPU, torch.float32, "enable_sequential_cpu_offload", "none"), lambda _: None)
    assert {parameter.device.type for parameter in pipeline.unet.parameters()} == {"meta"}
    assert pipeline._execution_device == CPU


class Part(torch.nn.Module):
    """Notes where it is moved."""

    def __init__(self, name: str, moves: list[tuple[str, str]]) -> None:
        super().__init__()
        self._name, self._moves = name, moves

    def to(self, device: Any) -> Part:  # type: ignore[override]
        self._moves.append((self._name, str(device)))
        return self

    def forward(self, value: int) -> int:
        return value + 1


def test_parts_take_turns_in_any_order_and_one_at_a_time_has_the_device() -> None:
    moves: list[tuple[str, str]] = []
    encoder, unet, vae = (Part(name, moves) for name in ("encoder", "unet", "vae"))
    placement.take_turns({"encoder": encoder, "unet": unet, "vae": vae}, torch.device("meta"))
    moves.clear()
    for part in (encoder, unet, unet, unet, encoder, unet, vae, encoder):
        assert part(1) == 2
    here, there = "cpu", "meta"
    assert moves == [
        ("encoder", there),
        ("encoder", here),
        ("unet", there),
        ("unet", here),
        ("encoder", there),
        ("encoder", here),
        ("unet", there),
        ("unet", here),
        ("vae", there),
        ("vae", here),
        ("encoder", there),
    ]


def test_a_part_that_does_not_fit_leaves_the_device_to_the_next_one_and_comes_whole_the_second_time() -> None:
    class Large(Part):
        full = True

        def to(self, device: Any) -> Large:  # type: ignore[override]
            super().to(device)
            if str(device) != "cpu" and self.full:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self

    moves: list[tuple[str, str]] = []
    encoder, unet = Part("encoder", moves), Large("unet", moves)
    placement.take_turns({"encoder": encoder, "unet": unet}, torch.device("meta"))
    encoder(1)
    moves.clear()
    with pytest.raises(torch.OutOfMemoryError):
        unet(1)
    assert moves == [("encoder", "cpu"), ("unet", "meta"), ("unet", "cpu")]
    unet.full = False
    assert unet(1) == 2 and moves[3:] == [("unet", "meta")]


def test_a_part_that_cannot_leave_comes_whole_the_next_time() -> None:
    class Stuck(Part):
        stuck = False

        def to(self, device: Any) -> Stuck:  # type: ignore[override]
            super().to(device)
            if str(device) == "cpu" and self.stuck:
                raise MemoryError
            return self

    moves: list[tuple[str, str]] = []
    encoder, unet = Stuck("encoder", moves), Part("unet", moves)
    placement.take_turns({"encoder": encoder, "unet": unet}, torch.device("meta"))
    encoder(1)
    encoder.stuck = True
    with pytest.raises(MemoryError):
        unet(1)
    moves.clear()
    assert encoder(1) == 2 and moves == [("encoder", "meta")]


def test_going_back_and_forth_is_costly_for_whole_parts_and_for_layers_alone() -> None:
    def interleaves(offload: str | None) -> bool:
        return Placement(CPU, torch.float32, offload, "none").interleaves

    assert [interleaves(offload) for offload in (None, *OFFLOADS)] == [True, False, False, True]


# --- Without a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_computes_in_float32() -> None:
    assert choose_placement(Settings()) == Placement(CPU, torch.float32, None, "none")
    assert choose_placement(Settings(dtype="bfloat16")).dtype == torch.bfloat16
    for device in ("cuda", "cuda:1"):
        with pytest.raises(
            ModelLoadFailed, match=f"--device is {device}, but no GPU is visible here; use --device cpu"
        ):
            choose_placement(Settings(device=device))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_without_a_gpu_runs_on_the_cpu_and_says_so(offload: str, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_placement(Settings(device=offload)) == Placement(CPU, torch.float32, None, "none")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"--device is {offload}, but no GPU is visible here: the model runs on the CPU, all of it"
    )


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantization_that_needs_a_gpu_is_refused_without(quantization: Any) -> None:
    with pytest.raises(
        ModelLoadFailed, match=f"--quantization {quantization} needs a GPU; on a CPU take .* fp8 or none"
    ):
        load_family(Settings(model_id="demo", quantization=quantization))


# --- With a GPU, as far as that can be chosen without one ------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9) if device.index else (7, 5))


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_computes_in_bfloat16_where_it_is_new_enough() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for name in ("auto", "cuda", "cuda:0"):
        assert choose_placement(Settings(device=name)) == Placement(first, torch.float16, None, "none")
    assert choose_placement(Settings(device="cuda:1")) == Placement(second, torch.bfloat16, None, "none")
    assert choose_placement(Settings(device="cpu")) == Placement(CPU, torch.float32, None, "none")
    for offload in OFFLOADS:
        assert choose_placement(Settings(device=offload)) == Placement(first, torch.float16, offload, "none")
    with pytest.raises(ModelLoadFailed, match="--device is cuda:2, but only 2 GPUs are visible here, counted from 0"):
        choose_placement(Settings(device="cuda:2"))


@pytest.mark.parametrize(
    ("count", "visible"), [(0, "no GPU is visible"), (1, "only one GPU is visible"), (2, "only 2 GPUs are visible")]
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("replicas", [3, "auto"])
def test_every_copy_of_too_many_says_the_same(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str, device: str, replicas: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    settings = Settings(replicas=replicas, device=device)
    for index in range(3):
        with pytest.raises(ModelLoadFailed, match=f"^--replicas is 3, but {visible} here, and each copy"):
            choose_placement(settings.for_replica(index, 3))


@pytest.mark.usefixtures("two_gpus")
def test_as_many_copies_as_gpus_have_one_each_and_those_on_the_cpu_need_none() -> None:
    for index in range(2):
        placement = choose_placement(Settings(replicas=2).for_replica(index, 2))
        assert placement.device == torch.device("cuda", index)
    assert choose_placement(Settings(replicas=3, device="cpu").for_replica(2, 3)).device == CPU


@pytest.mark.usefixtures("two_gpus")
def test_the_thread_of_a_gpu_makes_it_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(device: torch.device) -> None:
        raise RuntimeError(f"{device} is taken, which is not here")

    monkeypatch.setattr(torch.cuda, "set_device", take)
    with pytest.raises(RuntimeError, match="cuda:1 is taken"):
        load_family(Settings(model_id="demo", device="cuda:1"))


@pytest.mark.usefixtures("two_gpus")
def test_weights_are_read_to_the_gpu_unless_they_wait_on_the_cpu() -> None:
    assert choose_placement(Settings(device="cuda:1")).read_to == torch.device("cuda", 1)
    assert choose_placement(Settings(device="cpu")).read_to == CPU
    for offload in OFFLOADS:
        assert choose_placement(Settings(device=offload)).read_to is None


@pytest.mark.usefixtures("two_gpus")
def test_quantization_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelLoadFailed, match="needs the package bitsandbytes; install the extra 'quantization'"):
        choose_placement(Settings(quantization="nf4")).quantization_config()
    for offload in OFFLOADS[1:]:
        with pytest.raises(ModelLoadFailed, match=f"--quantization int8 does not go with --device {offload}"):
            choose_placement(Settings(quantization="int8", device=offload)).quantization_config()
    assert choose_placement(Settings(quantization="fp8")).quantization_config() is None


@pytest.mark.parametrize(
    ("full", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "The device has too little memory for /m; take --device enable_",
        ),
        (MemoryError(), "There is too little memory for /m; free some, or take --dtype, "),
    ],
)
def test_what_fills_up_while_weights_are_read_is_told_with_a_remedy(full: Exception, says: str) -> None:
    with pytest.raises(ModelLoadFailed) as caught, told("/m"):
        raise full
    assert str(caught.value).startswith(says)


# --- Number formats --------------------------------------------------------------------------------------------


def test_a_vae_that_overflows_in_half_precision_is_float32_from_the_start(tmp_path: Any) -> None:
    pipeline = load_demo()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.save_pretrained(tmp_path)
    family = load_family(Settings(model_id=str(tmp_path), dtype="float16"))
    assert isinstance(family, SdxlFamily)
    assert (family._base.unet.dtype, family._pipeline.vae.dtype) == (torch.float16, torch.float32)
    # Never rounded to half precision on the way.
    assert torch.equal(family._pipeline.vae.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)
    family = load_family(Settings(model_id=str(tmp_path), dtype="bfloat16"))
    assert isinstance(family, SdxlFamily)
    assert family._pipeline.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("offload", [None, *OFFLOADS])
def test_fp8_storage_quarters_the_unet_and_paints_almost_the_same(family: SdxlFamily, offload: str | None) -> None:
    pipeline = load_demo()
    whole = sum(parameter.nbytes for parameter in pipeline.unet.parameters())
    store_as_fp8(pipeline.unet, torch.float32)
    assert sum(parameter.nbytes for parameter in pipeline.unet.parameters()) < 0.3 * whole
    place(parts_of(pipeline), Placement(CPU, torch.float32, offload, "fp8"), lambda _: None)
    stored = SdxlFamily(pipeline)
    picture = ours(stored, **COMMON)
    assert 0 < abs(picture.astype(int) - ours(family, **COMMON)).mean() < 5
    assert np.array_equal(ours(stored, **COMMON), picture)


def test_the_vae_is_tiled_and_sliced_where_that_is_wanted() -> None:
    family = load_family(Settings(model_id="demo", vae_tiling=True, vae_slicing=True))
    assert isinstance(family, SdxlFamily)
    assert family._pipeline.vae.use_tiling and family._pipeline.vae.use_slicing
    plain = load_family(Settings(model_id="demo"))
    assert isinstance(plain, SdxlFamily)
    assert not plain._pipeline.vae.use_tiling and not plain._pipeline.vae.use_slicing
