"""What torch compiles, kept in ``--cache_dir`` from one start to the next.

The C++ compiler writes its libraries in place. One that was killed leaves a piece, which every later start would load
and fail with; so whoever compiles leaves a mark until it is done, and what a mark without an owner tells of is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.errors import InvalidSettings, ModelLoadFailed

logger = logging.getLogger(__name__)

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Where the compilers keep what they made, by the variables that tell them."""
MARK = "compiling-"


def keep(folder: Path | None) -> None:
    """Have what torch compiles kept in `folder`; to be called before torch is imported.

    Raises:
        InvalidSettings: it cannot be written to.
    """
    if folder is None:
        return
    for variable, name in FOLDERS.items():
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            writable = os.access(folder / name, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable:
            raise InvalidSettings(
                f"--cache_dir is {folder}, where nothing can be written; mount a volume there that the user of this "
                "server may write to, or leave it out."
            )
        os.environ[variable] = str(folder / name)
    with contextlib.suppress(OSError):
        _mend(folder)


@contextlib.contextmanager
def compiling(folder: Path | None) -> Iterator[None]:
    """Inside, `folder` is written to. If that fails, it is empty afterwards, for what it held may be why.

    Raises:
        ModelLoadFailed: as from inside.
    """
    if folder is None:
        yield
        return
    mark = None
    with contextlib.suppress(OSError):
        # Locked as long as this process lives.
        number, name = tempfile.mkstemp(prefix=MARK, dir=folder)
        fcntl.flock(number, fcntl.LOCK_EX)
        mark = (number, Path(name))
    try:
        yield
    except ModelLoadFailed as error:
        for name in FOLDERS.values():
            shutil.rmtree(folder / name, ignore_errors=True)
        raise ModelLoadFailed(f"{error} What {folder} held is deleted, so the next start compiles anew.") from error
    finally:
        if mark is not None:
            with contextlib.suppress(OSError):
                mark[1].unlink()
            os.close(mark[0])


def _mend(folder: Path) -> None:
    for mark in folder.glob(f"{MARK}*"):
        with mark.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its owner is still at it
            since = mark.stat().st_mtime
            pieces = [library for library in folder.rglob("*.so") if library.stat().st_mtime >= since]
            for library in pieces:
                library.unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
        logger.warning("a start was cut short while it compiled: %d files in %s are deleted", len(pieces), folder)
