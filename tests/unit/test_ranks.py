"""Being one of torchrun's processes: how that is recognised, and which settings are refused then."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from app.engine.faults import as_fault
from app.engine.parallel import check_heads, own_device
from app.engine.ranks import Ranks, check_settings, find_ranks
from app.engine.weights import load_family
from app.errors import DeviceLost, InvalidSettings, ModelLoadFailed
from app.settings import Settings

TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"},
}
RANKS = Ranks(1, 1, 2)


def test_torchruns_processes_know_which_they_are() -> None:
    assert find_ranks(TORCHRUN) == Ranks(rank=5, local_rank=1, size=8)
    assert find_ranks({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) is None
    assert find_ranks({}) is None


def test_variables_that_a_platform_sets_for_its_own_reasons_mean_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert find_ranks({name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}) is None
    assert "not started by torchrun" in caplog.text


@pytest.mark.parametrize("wrong", [{"RANK": "first"}, {"WORLD_SIZE": ""}])
def test_damaged_variables_are_told(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidSettings, match="RANK, LOCAL_RANK, WORLD_SIZE are not all numbers"):
        find_ranks({**TORCHRUN, **wrong})
    with pytest.raises(InvalidSettings, match="are not all numbers"):
        find_ranks({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_type": "sdxl"}, "take --replicas auto instead"),
        ({"replicas": 2}, "--replicas 2 cannot be"),
        ({"device": "enable_model_cpu_offload"}, "--device enable_model_cpu_offload cannot be"),
        ({"device": "cuda:0"}, "--device cuda:0 cannot be"),
        ({"optimize": "compile"}, "cannot be compiled"),
        ({"optimize": "max"}, "cannot be compiled"),
        ({"step_cache": 2}, "without --step_cache"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence) as told:
        check_settings(Settings(**settings), RANKS)
    assert str(told.value).startswith("torchrun started 2 processes that share one model")


def test_all_processes_have_one_copy_of_the_model() -> None:
    assert check_settings(Settings(replicas="auto", optimize="safe", quantization="fp8"), RANKS).replicas == 1


def test_a_model_that_cannot_be_shared_is_refused_before_it_is_read() -> None:
    with pytest.raises(ModelLoadFailed, match="only FLUX can be shared by several processes"):
        load_family(Settings(model_id="demo"), ranks=RANKS)


@pytest.mark.parametrize(("size", "fits"), [(2, True), (3, True), (5, False), (7, False), (8, True)])
def test_heads_are_shared_evenly(size: int, fits: bool) -> None:
    if fits:
        check_heads(24, size)
    else:
        with pytest.raises(
            ModelLoadFailed, match="24 attention heads of this model can be shared by 2, 3, 4, 6, 8, 12"
        ):
            check_heads(24, size)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("auto", "cuda"):
        assert own_device(Settings(device=device), RANKS).device == "cuda:1"
        with pytest.raises(ModelLoadFailed, match="a process for GPU 2, counted from 0, but 2 are visible"):
            own_device(Settings(device=device), Ranks(2, 2, 3))
    assert own_device(Settings(device="cpu"), Ranks(2, 2, 3)).device == "cpu"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device(Settings(), RANKS).device == "auto"
    with pytest.raises(ModelLoadFailed, match="0 are visible"):
        own_device(Settings(device="cuda"), RANKS)


def test_whoever_is_gone_from_the_others_is_lost() -> None:
    assert isinstance(as_fault(torch.distributed.DistBackendError("NCCL error: out of memory")), DeviceLost)
