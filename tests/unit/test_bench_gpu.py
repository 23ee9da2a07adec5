"""The benchmark for GPUs: floors that count the published work, rows that do not fit, pieces that make one table."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.engine.family import Family
from app.errors import OutOfMemory
from app.settings import Settings
from tests.benchmarks import gpu, gpu_report
from tests.benchmarks.devices import summarize as summarize_log
from tests.benchmarks.engines import Engine, Wave, distance, share_weights
from tests.benchmarks.gpu import (
    LEVELS,
    MODELS,
    UNFIT,
    Setup,
    count_work,
    keep,
    read,
    start,
    summarize,
    take_turns,
    write,
)
from tests.fakes import FakeJob, Instant
from tests.gpu.full_size import make_models
from tests.readme import fastest_on_gpus, on_gpus

CPU = torch.device("cpu")


class HasRoomForTwo(Instant):
    """Takes two images in a pass and no more."""

    def step(self, jobs: Sequence[FakeJob]) -> None:
        if len(jobs) > 2:
            raise OutOfMemory("The device has too little memory for this request.")
        super().step(jobs)


def load() -> tuple[Family[Any], Mapping[str, nn.Module]]:
    return HasRoomForTwo(), {}


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(load, Settings(), CPU)
    yield engine
    engine.close()


def setup(*images: int) -> Setup:
    return Setup(CPU, torch.float32, True, 64, ("off",), images, rounds=2, differences=False, rate=1.0)


def test_what_does_not_fit_is_said_so_and_the_rest_is_measured(engine: Engine) -> None:
    *so_far, waves = take_turns({"off": engine}, setup(1, 2, 4), MODELS["flux-schnell"])
    assert len(so_far) == 5, "what was measured can be kept after each of three cases, twice"
    assert waves["off", (2, 4)] == UNFIT
    for images in (1, 2):
        found = waves["off", (2, images)]
        assert isinstance(found, list) and len(found) == 2
        assert all(wave.rows == images and 0 < wave.seconds <= wave.latency for wave in found)
        assert all(wave.passes == {"transformer": 2 * images} for wave in found)


def test_without_a_level_nothing_is_painted() -> None:
    assert not any(take_turns({}, setup(1), MODELS["flux-schnell"]))


def test_only_what_can_leave_out_work_has_the_levels_that_do() -> None:
    every = dataclasses.replace(setup(1), levels=LEVELS)
    besides = {"flux-dev": ["step_cache"], "flux-schnell": []}
    for name, model in MODELS.items():
        assert every.levels_of(model) == ["off", "safe", "compile", "max", *besides.get(name, ["guidance_end"])]


def test_two_levels_start_from_the_same_noise_whatever_each_would_draw() -> None:
    model, how = MODELS["sdxl"], setup(1)
    engine = start(make_models(model.folders(True), CPU, torch.float32), how, Settings(optimize="off"), torch.float32)
    try:
        request = how.request(model, steps=2)
        one = engine.follow(request)
        same = engine.follow(dataclasses.replace(request, seed=1), noise=one)
        other = engine.follow(dataclasses.replace(request, seed=1))
    finally:
        engine.close()
    assert [distance(a, b) for a, b in zip(same.latents, one.latents, strict=True)] == [0.0, 0.0, 0.0]
    assert distance(other.latents[-1], one.latents[-1]) > 0.1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rows", "2", "0"], "argument --rows: must be a whole number of at least 1, not '0'"),
        (["--rows", "two"], "argument --rows: must be a whole number of at least 1, not 'two'"),
        (["--rounds", "0"], "argument --rounds: must be a whole number of at least 1, not '0'"),
        (["--rounds=-1"], "argument --rounds: must be a whole number of at least 1, not '-1'"),
        (["--device", "gpu"], "argument --device: must be auto, cpu, cuda or cuda:N, not 'gpu'"),
        (["--device", "cuda:007"], "argument --device: must be auto, cpu, cuda or cuda:N, not 'cuda:007'"),
        (["--device", "cuda"], "--device is cuda, but no GPU is visible here; use --device cpu."),
        (["--device", "cuda:1"], "--device is cuda:1, but no GPU is visible here; use --device cpu."),
        (["--out", f"{__file__}/results"], "results (Not a directory); choose another --out"),
        (["--out", __file__], "(File exists); choose another --out"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delattr(gpu, "matrix_rate")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--small", "--device", "cpu", *flags])
    assert ended.value.code == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: ") and last.startswith("python -m tests.benchmarks.gpu: error: ")
    assert last.endswith(sentence)


def test_a_folder_that_refuses_files_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Permissions would not stop root.
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.delattr(gpu, "matrix_rate")
    with pytest.raises(SystemExit):
        gpu.main(["--small", "--device", "cpu", "--out", str(tmp_path)])
    assert f"nothing can be written to {tmp_path} (No space left on device)" in capsys.readouterr().err


def full(**_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_closed_engine_holds_no_family() -> None:
    engine = Engine(load, Settings(), CPU)
    family = weakref.ref(engine.family)
    engine.close()
    assert family() is None


# TFLOP of steps with guidance by a negative prompt, of T5's 512 tokens and of the decoding: what others have counted.
# Hugging Face's benchmarks have 5.98 of the linear layers and convolutions of one row of SDXL, 59.5 of FLUX's linear
# layers; attention comes on top.
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("sdxl-refiner", {"base": 13.52, "refiner": 14.58, "decode": 10.47, "encode": 0.209}),
        ("flux-dev", {"transformer": 74.4, "decode": 10.47, "encode": 4.858}),
    ],
)
def test_the_work_of_full_size_models_is_what_is_known_of_them(model: str, expected: dict[str, float]) -> None:
    assert count_work(MODELS[model], small=False, side=1024) == pytest.approx(expected, rel=2e-3)


def test_a_floor_is_the_work_of_all_passes_over_the_rate() -> None:
    wave = Wave(3.0, 3.5, 4, {"base": 40, "refiner": 10}, 0.1, 0.1, 0.1, 0.1, None)
    work = {"base": 13.0, "refiner": 14.0, "encode": 0.5, "decode": 10.0}
    row = summarize([wave], images=2, work=work, rate=700.0)
    assert row["tflop"] == 40 * 13 + 10 * 14 + 2 * 10.5
    assert row["floor"] == pytest.approx(row["tflop"] / 700)
    assert row["images_per_second"] == pytest.approx(2 / 3)


def test_copies_share_weights_and_are_changed_alone() -> None:
    part: Any = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)).requires_grad_(False)
    one, other = (share_weights([{"unet": part, "options": {}}])[0]["unet"] for _ in range(2))
    assert one[1].weight.data_ptr() == other[1].weight.data_ptr() == part[1].weight.data_ptr()
    one.to(memory_format=torch.channels_last)
    one[1] = nn.Identity()
    assert one[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert other[0].weight.is_contiguous() and isinstance(other[1], nn.Linear)


def test_a_table_of_nothing_is_a_table_all_the_same(tmp_path: Path) -> None:
    run = {"dtype": "bfloat16", "torch": "2.13", "rounds": 3, "rate_tflops": 700.0}
    results = read(None) | {"device": "NVIDIA H100", "side": 1024, "small": False, "runs": [run]}
    write(results, tmp_path / "new" / "gpu-nvidia-h100.json")
    tables = [each.splitlines() for each in (tmp_path / "new" / "gpu-nvidia-h100.md").read_text().split("\n\n")]
    tables = [lines for lines in tables if lines[0].startswith("|")]
    assert len(tables) == 2
    for header, line in tables:
        assert header.count("|") == line.count("|") and "|  |" not in header


def test_a_difference_is_relative_to_the_reference() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert distance(reference, reference) == 0
    assert distance(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)


def test_a_record_takes_the_place_of_an_older_one_and_all_stand_in_order() -> None:
    rows: list[dict[str, Any]] = []
    for level, images, seconds in [("max", 1, 1.0), ("off", 16, 2.0), ("off", 2, 3.0), ("max", 1, 4.0)]:
        keep(rows, {"level": level, "images": images, "seconds": seconds}, ("level", "images"))
    assert [tuple(row.values()) for row in rows] == [("off", 2, 3.0), ("off", 16, 2.0), ("max", 1, 4.0)]


def test_a_log_of_nvidia_smi_is_summed_up_without_what_is_cut_off() -> None:
    lines = "1980, 310.5, 41\n1755, 698.2, 60\n1740, 699.0, 62\n17"
    assert summarize_log(lines) == {
        "clock_mhz": {"least": 1740, "median": 1755, "most": 1980},
        "power_w": {"least": 310.5, "median": 698.2, "most": 699.0},
        "temperature_c": {"least": 41, "median": 60, "most": 62},
    }
    assert summarize_log("[N/A], [N/A], 41\nNo devices were found\n") is None


def test_the_readme_shows_what_gpus_there_are_results_of_and_no_small_runs(tmp_path: Path) -> None:
    assert on_gpus(tmp_path).startswith("Nothing was measured on a GPU yet: `make bench-gpu`")
    run = {"dtype": "bfloat16", "torch": "2.13", "rounds": 3, "rate_tflops": 700.0}
    results = read(None) | {"device": "NVIDIA H100", "side": 1024, "small": False, "runs": [run]}
    keep(results["levels"], {"model": "sdxl", "level": "max", "unavailable": UNFIT}, ("model", "level"))
    write(results, tmp_path / "gpu-nvidia-h100.json")
    write(results | {"device": "Other"}, tmp_path / "gpu-other-small.json")
    text = on_gpus(tmp_path)
    assert gpu_report.table(results).strip() in text and "| SDXL | – | `max` | does not fit |" in text
    assert "gpu-nvidia-h100.svg" in text and "Other" not in text


def test_what_a_replica_paints_is_the_most_that_was_measured_of_each_model(tmp_path: Path) -> None:
    run = {"dtype": "bfloat16", "torch": "2.13", "rounds": 3, "rate_tflops": 700.0}
    results = read(None) | {"device": "NVIDIA H100", "side": 1024, "small": False, "runs": [run]}
    for level, images, rate in (("compile", 1, 0.8), ("compile", 8, 1.6), ("compile", 16, 1.5), ("max", 8, 2.5)):
        results["rows"].append(
            {"model": "sdxl", "level": level, "steps": 20, "images": images, "images_per_second": rate}
        )
    results["rows"].append({"model": "flux-dev", "level": "compile", "steps": 28, "images": 1, "unavailable": UNFIT})
    (tmp_path / "gpu-nvidia-h100.json").write_text(json.dumps(results))
    (tmp_path / "gpu-cpu-small.json").write_text(json.dumps(results | {"small": True}))
    assert fastest_on_gpus(tmp_path) == [("SDXL, 20 steps", "NVIDIA H100", 1.6)]
