"""What torch compiles, kept in ``--cache_dir`` from one start to the next.

The C++ compiler writes its libraries in place. One that was killed leaves a piece, which every later start would load
and fail with; so whoever compiles leaves a mark until it is done, and what a mark without an owner tells of is removed.
A second one in a row that has written nothing, and was not told to end, may have died of what it has read, and all of
it goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from app.errors import GenerationFailed, InvalidSettings, ModelLoadFailed, OutOfMemory
from app.settings import Settings

logger = logging.getLogger(__name__)

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Where the compilers keep what they made, by the variables that tell them."""
SEPARATORS = re.compile(r"[\s'\"\\]")
"""Where torch takes the C++ compiler's command apart. Source: ``shlex.split`` in ``torch/_inductor/cpp_builder.py``."""
FULL = 16 * 1024**2
"""Bytes of free space below which it is the likely reason why nothing compiles."""
HEARD = 1.0
"""Seconds within which a signal that has ended the compilers, as Ctrl-C does, is heard of here as well."""
MARK = "compiling-"
SUSPECT = "cut-short"
"""Is there after a start that was cut short and had written nothing, until one gets through."""
TOLD = "told-to-end"
"""Is there after a start that was told to end before it was through, until the next one."""


def folder_of(settings: Settings) -> Path | None:
    """Where these settings have it kept; ``None`` where nothing is compiled, or the environment says another place.

    Without ``--cache_dir`` that is among the caches of the user, as the compilers' own usual places have no marks.
    """
    if settings.cache_dir is not None or not settings.compiles:
        return settings.cache_dir
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl-runtime"
    chosen = any(os.environ.get(each, str(usual / name)) != str(usual / name) for each, name in FOLDERS.items())
    return None if chosen or SEPARATORS.search(str(usual)) else usual


def keep(settings: Settings) -> None:
    """Have what torch compiles kept where `settings` say; to be called before torch is imported.

    Raises:
        InvalidSettings: nothing can be written there.
    """
    folder = folder_of(settings)
    if folder is None:
        return
    if settings.compiles and SEPARATORS.search(str(folder.absolute())):
        raise InvalidSettings(
            f"--cache_dir is {folder}, but the C++ compiler is given no path with spaces, quotes or backslashes; name "
            "another one."
        )
    for variable, name in FOLDERS.items():
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            writable = os.access(folder / name, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable and settings.cache_dir is None:
            return
        if not writable:
            raise InvalidSettings(
                f"--cache_dir is {folder}, where nothing can be written; mount a volume there that the user of this "
                "server may write to, or leave it out."
            )
        os.environ[variable] = str(folder / name)
    with contextlib.suppress(OSError):
        _mend(folder)


@contextlib.contextmanager
def compiling(folder: Path | None, ending: threading.Event | None = None) -> Iterator[None]:
    """Inside, `folder` is written to. If that fails, what it held may be why, and is deleted where that is allowed.

    Args:
        folder: of `folder_of`.
        ending: is set once this process is told to end; what fails then is left for the next start to mend.

    Raises:
        ModelLoadFailed: as from inside.
    """
    if folder is None or not folder.is_dir():
        yield
        return
    mark, cut_short = None, False
    with contextlib.suppress(OSError):
        # Locked as long as this process lives, and for others alone: replicas fail together, and not each other.
        number, name = tempfile.mkstemp(prefix=MARK, dir=folder)
        mark = (number, Path(name))
        fcntl.lockf(number, fcntl.LOCK_EX)
        os.fchmod(number, 0o666)  # whoever the next one is can ask for the lock
    try:
        yield
        with contextlib.suppress(OSError):
            (folder / SUSPECT).unlink(missing_ok=True)
    except OutOfMemory:
        raise
    except (ModelLoadFailed, GenerationFailed) as error:
        cut_short = ending is not None and ending.wait(HEARD)
        if cut_short:
            raise
        if any(_in_use(each) for each in folder.glob(f"{MARK}*") if mark is None or each != mark[1]):
            raise ModelLoadFailed(str(error)) from error  # somebody else compiles with what it holds
        free = shutil.disk_usage(folder).free
        _empty(folder)
        if free < FULL:
            raise ModelLoadFailed(
                f"{folder} is full ({free // 1024**2} MiB were left), so that nothing could be compiled; give it more "
                "room, or name another --cache_dir."
            ) from error
        if any(next((folder / name).glob("*"), None) for name in FOLDERS.values()):
            raise ModelLoadFailed(
                f"{error} What {folder} holds may be why, and this user may not delete it; let its owner do so, or "
                "name another --cache_dir."
            ) from error
        raise ModelLoadFailed(f"{error} What {folder} held is deleted, so the next start compiles anew.") from error
    finally:
        if mark is not None:
            with contextlib.suppress(OSError):
                if not cut_short:
                    mark[1].unlink()
            os.close(mark[0])


def excuse(folder: Path | None) -> None:
    """Note for the next start that this one was told to end, and has not died of anything that it has read.

    Args:
        folder: of `folder_of`.
    """
    with contextlib.suppress(OSError):
        if folder is not None:
            (folder / TOLD).touch()


def _mend(folder: Path) -> None:
    told = (folder / TOLD).exists()
    for mark in folder.glob(f"{MARK}*"):
        if _in_use(mark):
            continue
        since = mark.stat().st_mtime
        pieces = [library for library in folder.rglob("*.so") if library.stat().st_mtime >= since]
        for library in pieces:
            library.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
        logger.warning("a start was cut short while it compiled: %d files in %s are deleted", len(pieces), folder)
        if pieces or told:
            continue
        if (folder / SUSPECT).exists():
            logger.warning("it was the second in a row: all that %s held is deleted", folder)
            _empty(folder)
        else:
            (folder / SUSPECT).touch()
    (folder / TOLD).unlink(missing_ok=True)


def _in_use(mark: Path) -> bool:
    """Whether another process that left that mark lives, or may."""
    try:
        with mark.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / SUSPECT).unlink(missing_ok=True)
    for name in FOLDERS.values():
        shutil.rmtree(folder / name, ignore_errors=True)
