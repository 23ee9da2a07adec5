"""Threads for as many cores as the container may use, that leave them to others while they wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app import cores


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing, on a host of 64 cores."""
    for name in (*cores.COUNTS, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is what it was after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def limit(folder: Path, quota: str, period: str = "100000", version: int = 2) -> Path:
    """A container's control group."""
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n", encoding="ascii")
    else:
        (folder / "cpu").mkdir()
        (folder / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n", encoding="ascii")
        (folder / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n", encoding="ascii")
    return folder


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("quota", "threads"), [("200000", "2"), ("150000", "2"), ("50000", "1"), ("6400000", None)])
@pytest.mark.usefixtures("outside")
def test_there_are_as_many_threads_as_cores_may_be_used(
    version: int, quota: str, threads: str | None, tmp_path: Path
) -> None:
    cores.share(limit(tmp_path, quota, version=version))
    assert [os.environ.get(name) for name in cores.COUNTS] == [threads] * 2


@pytest.mark.parametrize(
    ("quota", "period", "version"),
    [("max", "100000", 2), ("-1", "100000", 1), ("1", "0", 2), ("", "", 1), ("what", "100000", 2)],
)
@pytest.mark.usefixtures("outside")
def test_without_a_limit_torch_counts_the_cores_itself(quota: str, period: str, version: int, tmp_path: Path) -> None:
    cores.share(limit(tmp_path, quota, period, version))
    cores.share(tmp_path / "nowhere")
    assert os.environ.keys().isdisjoint(cores.COUNTS)


@pytest.mark.usefixtures("outside")
def test_what_the_environment_says_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    cores.share(limit(tmp_path, "200000"))
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP library elsewhere")
def test_torchs_openmp_library_hears_of_it() -> None:
    code = "from app.cores import share; share(); import torch"
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=outside | {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert re.search(rf"GOMP_SPINCOUNT = '{cores.SPINS}'", told)
