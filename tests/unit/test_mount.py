"""Waiting for a mount: what counts as there, whose absence is waited for, and how long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.engine import mount
from app.engine.mount import wait_for_mount, what_is_missing
from app.errors import ModelLoadFailed
from app.settings import Settings

FOREVER = 3600.0


def wait(settings: Settings, then: Callable[[], None] = lambda: None) -> list[str]:
    """What is reported, `then` being done once something is."""
    reports: list[str] = []

    def report(phase: str) -> None:
        if not reports:
            threading.Thread(target=then).start()
        reports.append(phase)

    wait_for_mount(settings, report)
    return list(dict.fromkeys(reports))


def fill(folder: Path) -> None:
    """As a mount does: all at once."""
    full = folder.with_name("full")
    full.mkdir()
    (full / "model_index.json").write_text("{}")
    if folder.exists():
        folder.rmdir()
    full.rename(folder)


def test_what_is_there_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "file.safetensors").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for path in ("models", "link", "models/file.safetensors"):
        assert wait(Settings(model_id=str(tmp_path / path), mount_timeout=FOREVER)) == []


def test_a_folder_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "mnt" / "models"
    folder.parent.mkdir()
    settings = Settings(model_id=str(folder), mount_timeout=FOREVER)
    assert wait(settings, lambda: fill(folder)) == [f"waiting for the mount, {folder} does not exist"]


def test_an_empty_folder_is_waited_for_until_it_is_mounted_over(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    settings = Settings(model_id=str(folder), mount_timeout=FOREVER)
    assert f"waiting for the mount, {folder} is empty" in wait(settings, lambda: fill(folder))


def test_a_link_is_waited_for_until_its_target_is_there(tmp_path: Path) -> None:
    """As a model image appears: a link into another container's root."""
    folder = tmp_path / "models"
    folder.symlink_to(tmp_path / "proc" / "models")
    (tmp_path / "proc").mkdir()
    settings = Settings(model_id=str(folder), mount_timeout=FOREVER)
    reports = wait(settings, lambda: fill(tmp_path / "proc" / "models"))
    assert reports == [f"waiting for the mount, {folder} is a link to something that is not there"]
    assert what_is_missing(folder) == ""


def test_the_refiner_is_waited_for_where_it_is_used(tmp_path: Path) -> None:
    base, refiner = tmp_path / "base.safetensors", tmp_path / "refiner"
    base.write_bytes(b"x")
    settings = Settings(single_file_model=base, refiner_id=str(refiner), mount_timeout=FOREVER)
    assert wait(settings) == []
    used = settings.model_copy(update={"use_refiner": True})
    assert wait(used, lambda: fill(refiner)) == [f"waiting for the mount, {refiner} does not exist"]


def test_what_does_not_appear_in_time_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed) as caught:
        wait(Settings(model_id=str(tmp_path / "models"), mount_timeout=0.3))
    assert str(caught.value) == (
        f"{tmp_path}/models does not exist, after 0.3 seconds of waiting (the setting mount_timeout); mount a model "
        "there, name another one with --model_id, or try the demo with --model_id demo."
    )


@pytest.mark.parametrize("model_id", ["demo", "stabilityai/stable-diffusion-xl-base-1.0", "/nowhere/models", "models"])
def test_all_but_the_mount_is_left_to_loading(model_id: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert wait(Settings(model_id=model_id)) == []
    if not model_id.startswith("/"):
        assert wait(Settings(model_id=model_id, mount_timeout=FOREVER)) == []


@pytest.mark.parametrize(
    ("settings", "mode", "waits"),
    [
        ({}, None, True),
        ({"model_id": "{}/base"}, None, True),
        ({"single_file_model": "{}/base.safetensors"}, None, True),
        ({"model_type": "flux"}, None, False),
        ({"model_type": "flux"}, "async", True),
        ({"model_type": "flux", "model_id": "{}/flux"}, None, True),
        ({"mount_timeout": 0.0}, None, False),
        ({"model_id": "{}-elsewhere"}, None, False),
    ],
)
def test_unasked_only_the_mount_is_waited_for(
    settings: dict[str, Any], mode: str | None, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX comes from the hub where nothing is mounted, unless KServe says that something will be."""
    folder = tmp_path / "models"
    monkeypatch.setattr(mount, "MOUNT", folder)
    monkeypatch.setattr(mount, "DEFAULT_TIMEOUT", 0.1)
    monkeypatch.delenv("MODEL_INIT_MODE", raising=False)
    if mode:
        monkeypatch.setenv("MODEL_INIT_MODE", mode)
    given = {name: value.format(folder) if isinstance(value, str) else value for name, value in settings.items()}
    given.setdefault("model_id", str(folder))
    if waits:
        with pytest.raises(ModelLoadFailed, match=r"after 0\.1 seconds of waiting"):
            wait(Settings(**given))
    else:
        assert wait(Settings(**given)) == []


def test_an_adapter_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "late.safetensors"
    settings = Settings(model_id="demo", lora=(f"late={file}:0.5",), mount_timeout=FOREVER)
    assert wait(settings, file.touch) == [f"waiting for the mount, {file} does not exist"]
    file.unlink()
    with pytest.raises(ModelLoadFailed, match=r"mount the adapter there, or correct --lora\.$"):
        wait(settings.model_copy(update={"mount_timeout": 0.1}))
