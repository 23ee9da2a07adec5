"""A home where there is none, and last words where somebody looks for them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from app.surroundings import prepare, tell


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("home", [None, "", "/", "/nowhere/home"])
def test_a_home_that_cannot_be_written_is_replaced_by_one_for_this_user_alone(
    home: str | None, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    prepare()
    made = Path(os.environ["HOME"])
    assert made.parent == temporary and made.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "/")
    prepare()
    assert Path(os.environ["HOME"]) == made


def test_a_home_that_can_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare()
    assert os.environ["HOME"] == str(tmp_path)


def test_somebody_elses_folder_of_that_name_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / f"sdxl-runtime-{os.getuid()}").symlink_to(temporary / "elsewhere")
    monkeypatch.setenv("HOME", "/")
    prepare()
    made = Path(os.environ["HOME"])
    assert made.parent == temporary and made.is_dir() and not made.is_symlink()


def test_last_words_go_to_the_termination_log_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "termination-log"
    log.write_text("words of an earlier start, longer than those of this one")
    tell("The model folder /mnt/models does not exist.", log)
    assert log.read_text() == "The model folder /mnt/models does not exist."
    assert capsys.readouterr().err == "sdxl-runtime: The model folder /mnt/models does not exist.\n"


def test_a_termination_log_is_never_made_and_never_in_the_way(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (None, tmp_path / "absent", tmp_path, tmp_path / "pipe", Path("/dev/full")):
        tell("x" * 10_000, path)
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]
    (tmp_path / "log").touch()
    tell("x" * 10_000, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "x" * 4096
