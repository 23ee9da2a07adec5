"""A cache of compiled code that outlives starts that were cut short."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import compile_cache
from app.compile_cache import FOLDERS, compiling, folder_of
from app.errors import GenerationFailed, InvalidSettings, ModelLoadFailed
from app.settings import Settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in FOLDERS:
        monkeypatch.setenv(variable, "before")


def keep(folder: Path | None) -> None:
    compile_cache.keep(Settings(optimize="compile", cache_dir=folder))


def library(folder: Path, name: str, age: float = 0.0) -> Path:
    path = folder / "inductor" / name / f"{name}.main.so"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_compilers_are_told_where(tmp_path: Path) -> None:
    keep(None)
    assert {os.environ[variable] for variable in FOLDERS} == {"before"}
    keep(tmp_path / "new")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "new" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "new" / "triton")
    assert (tmp_path / "new" / "triton").is_dir()


def test_a_place_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidSettings, match=rf"--cache_dir is {file}, where nothing can be written"):
        keep(file)


@contextlib.contextmanager
def somebody_compiling(folder: Path) -> Iterator[None]:
    code = (
        "import sys, time, pathlib, app.compile_cache\n"
        "with app.compile_cache.compiling(pathlib.Path(sys.argv[1])):\n"
        "    print('compiling', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old = library(tmp_path, "old", age=60)
    with somebody_compiling(tmp_path):
        piece, source = library(tmp_path, "piece"), tmp_path / "inductor" / "source.py"
        source.touch()
        keep(tmp_path)
        assert piece.exists(), "somebody is at it"
    keep(tmp_path)
    assert not piece.exists()
    assert old.exists() and source.exists()
    again = library(tmp_path, "again")
    keep(tmp_path)
    assert again.exists(), "it is told once"


def test_who_is_done_leaves_everything(tmp_path: Path) -> None:
    with compiling(tmp_path):
        whole = library(tmp_path, "whole")
        (mark,) = tmp_path.glob(f"{compile_cache.MARK}*")
        assert mark.stat().st_mode & 0o666 == 0o666, "other users can see whether its owner lives"
    keep(tmp_path)
    assert whole.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"inductor", "triton"}


def test_a_cache_that_may_be_why_nothing_can_be_compiled_is_emptied(tmp_path: Path) -> None:
    library(tmp_path, "broken")
    mine = tmp_path / "mine.txt"
    mine.touch()
    told = rf"^No\. What {tmp_path} held is deleted, so the next start compiles anew\.$"
    with pytest.raises(ModelLoadFailed, match=told), compiling(tmp_path):
        raise ModelLoadFailed("No.")
    assert list(tmp_path.iterdir()) == [mine], "it may hold what is not ours"
    library(tmp_path, "broken")
    with pytest.raises(ModelLoadFailed, match="held is deleted"), compiling(tmp_path):
        raise GenerationFailed("Numbers that are not finite.")
    assert list(tmp_path.iterdir()) == [mine], "what a broken library computes is anything"
    keep(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"^No\.$"), compiling(None):
        raise ModelLoadFailed("No.")


@pytest.mark.parametrize("late", [0.0, 0.1])
def test_a_signal_that_ends_the_compilers_too_costs_nothing_but_their_pieces(tmp_path: Path, late: float) -> None:
    """Ctrl-C reaches all processes of a terminal, and what a compiler says then is that it cannot compile."""
    old, ending = library(tmp_path, "old", age=60), threading.Event()
    threading.Timer(late, ending.set).start()
    with pytest.raises(ModelLoadFailed, match=r"^No\.$"), compiling(tmp_path, ending):
        piece = library(tmp_path, "piece")
        raise ModelLoadFailed("No.")
    assert old.exists()
    keep(tmp_path)
    assert old.exists() and not piece.exists()


def test_what_may_not_be_deleted_is_not_said_to_be(tmp_path: Path) -> None:
    library(tmp_path, "theirs").parent.chmod(0o555)
    for folder in (tmp_path, tmp_path / "inductor"):
        folder.chmod(0o777)
    # The superuser deletes everything: ask as somebody else, to whom the way here may be closed.
    code = (
        "import os, sys, pathlib, app.errors; from app.compile_cache import compiling\n"
        "os.chdir(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    with compiling(pathlib.Path()): raise app.errors.ModelLoadFailed('No.')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def said() -> str:
        return subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout

    assert said().startswith("ModelLoadFailed No. What . holds may be why, and this user may not delete it; let its")
    (tmp_path / f"{compile_cache.MARK}theirs").touch(mode=0)
    assert said() == "ModelLoadFailed No.\n", "who left that mark may compile"
    (tmp_path / "inductor" / "theirs").chmod(0o755)


def test_who_cannot_compile_takes_nothing_from_others_who_do(tmp_path: Path) -> None:
    with somebody_compiling(tmp_path):
        theirs = library(tmp_path, "theirs")
        with pytest.raises(ModelLoadFailed, match=r"^No\.$"), compiling(tmp_path):
            raise ModelLoadFailed("No.")
        assert theirs.exists()


def test_replicas_of_one_server_do_not_keep_each_others_broken_cache(tmp_path: Path) -> None:
    with compiling(tmp_path):  # the second waits until the first is done
        broken = library(tmp_path, "broken")
        with pytest.raises(ModelLoadFailed, match="held is deleted"), compiling(tmp_path):
            raise ModelLoadFailed("No.")
        assert not broken.exists()


def test_where_nothing_can_be_locked_a_broken_cache_is_emptied_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with compiling(tmp_path):
        broken = library(tmp_path, "broken")
    assert not list(tmp_path.glob(f"{compile_cache.MARK}*")), "it would pass for somebody's for ever"
    with pytest.raises(ModelLoadFailed, match="held is deleted"), compiling(tmp_path):
        raise ModelLoadFailed("No.")
    assert not broken.exists()


def test_a_cache_that_kills_whoever_reads_it_is_emptied_the_second_time(tmp_path: Path) -> None:
    library(tmp_path, "broken", age=60)
    code = (
        "import os, signal, sys, pathlib, app.compile_cache\n"
        "with app.compile_cache.compiling(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGBUS)"
    )
    for libraries in (1, 0):
        subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
        keep(tmp_path)
        assert len(list(tmp_path.rglob("*.so"))) == libraries
    library(tmp_path, "anew", age=60)
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    keep(tmp_path)
    with compiling(tmp_path):
        pass
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    keep(tmp_path)
    assert len(list(tmp_path.rglob("*.so"))) == 1, "one got through in between"


def test_a_start_that_is_told_to_end_is_no_sign_of_a_broken_cache(tmp_path: Path) -> None:
    whole = library(tmp_path, "whole", age=60)
    code = (
        "import os, sys, pathlib, app.compile_cache as cache\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with cache.compiling(folder): {}; os._exit(0)"
    )

    def end(how: str) -> None:
        subprocess.run([sys.executable, "-c", code.format(how), tmp_path], check=True)
        keep(tmp_path)

    for _ in range(3):
        end("cache.excuse(folder)")
    end("pass")
    end("cache.excuse(folder)")
    assert whole.exists()
    end("pass")
    assert not whole.exists(), "two have died of themselves, and none has got through"


def test_without_a_folder_it_is_kept_among_the_users_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles = Settings(optimize="max")
    assert folder_of(compiles) is None, "the environment names a place"
    for variable in FOLDERS:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder_of(Settings()) is None
    assert folder_of(compiles) == tmp_path / "sdxl-runtime"
    keep(None)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "sdxl-runtime" / "triton")
    assert folder_of(compiles) == tmp_path / "sdxl-runtime"
    for variable in FOLDERS:
        monkeypatch.delenv(variable)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep(None)
    assert os.environ.keys().isdisjoint(FOLDERS), "the compilers' own places will do"


def test_a_full_disk_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with compiling(tmp_path):
        library(tmp_path, "whole")


def test_a_full_disk_is_named_where_nothing_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own words, such as "C++ compile error", lead nobody there."""
    monkeypatch.setattr(compile_cache, "FULL", 2**62)
    library(tmp_path, "half")
    with (
        pytest.raises(ModelLoadFailed, match=rf"^{tmp_path} is full \(\d+ MiB were left\).* more room"),
        compiling(tmp_path),
    ):
        raise ModelLoadFailed("The model cannot be compiled here (C++ compile error).")
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.parametrize("name", ["my cache", "o'clock", 'a"b', "back\\slash"])
def test_a_place_that_the_compiler_cannot_be_told_is_refused_or_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words would be "C++ compile error", at each start."""
    with pytest.raises(InvalidSettings, match="no path with spaces"):
        compile_cache.keep(Settings(optimize="compile", cache_dir=tmp_path / name))
    for variable in FOLDERS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    compile_cache.keep(Settings(optimize="compile"))
    assert os.environ.keys().isdisjoint(FOLDERS), "the compilers' own places will do"
