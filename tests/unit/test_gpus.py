"""Counting GPUs by their device files, as CUDA would show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.gpus import count_gpus
from app.errors import InvalidSettings
from app.main import count_replicas
from app.settings import Settings
from app.settings_sources import load_settings


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A folder as ``/dev`` is on a machine with four GPUs."""
    for name in ("null", "nvidia0", "nvidia1", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / name).touch()
    (tmp_path / "nvidia-caps").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 4),
        ("0,1", 2),
        (" 3 , 0 ", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("0,1,9,2", 2),
        ("1,1", 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-00000000", 2),
        ("MIG-a,MIG-b", 1),
        ("nonsense", 0),
    ],
)
def test_as_many_as_cuda_shows_are_counted(four: Path, visible: str | None, expected: int) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(environment, four) == expected


def test_without_device_files_there_are_none(tmp_path: Path) -> None:
    assert count_gpus({}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1"}, tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("settings", "gpus", "devices"),
    [
        (Settings(replicas="auto"), 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (Settings(replicas="auto", device="cuda"), 2, ["cuda:0", "cuda:1"]),
        (Settings(replicas="auto"), 1, ["auto"]),
        (Settings(replicas="auto"), 0, ["auto"]),
        (Settings(replicas="auto", device="cuda"), 0, ["cuda"]),
        (Settings(replicas="auto", device="cpu"), 4, ["cpu"]),
        (Settings(replicas="auto", device="cuda:1"), 4, ["cuda:1"]),
        (Settings(replicas="auto", device="enable_model_cpu_offload"), 4, ["enable_model_cpu_offload"]),
        (Settings(replicas=2), 4, ["cuda:0", "cuda:1"]),
        (Settings(), 4, ["auto"]),
    ],
)
def test_every_copy_has_a_gpu_of_its_own(settings: Settings, gpus: int, devices: list[str]) -> None:
    count = count_replicas(settings, lambda: gpus)
    assert [settings.for_replica(index, count).device for index in range(count)] == devices


@pytest.mark.parametrize("device", ["cuda:1", "enable_model_cpu_offload", "enable_group_offload"])
def test_copies_that_would_all_go_to_one_gpu_are_refused(device: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^replicas \(2\) choose their GPUs themselves; leave device at auto"):
        load_settings(["--replicas", "2", "--device", device], {})
