"""What the process finds around it: a home to write to, standard streams, and where its last words go.

A container may run as a user that nobody knows, on a file system of which only ``/tmp`` can be written.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import sys
import tempfile
from pathlib import Path

from app import heap

MOST_BYTES = 4096
"""Kubernetes reads no more of a termination log. Source: ``terminationMessagePath`` in the Kubernetes API."""


def prepare() -> None:
    """Make up for what libraries take for granted; to be called before they are imported."""
    _open_standard_streams()
    # On a CPU, torch keeps code for every shape that it met, four times as many by default: with many sizes and numbers
    # of rows that is hundreds of megabytes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    heap.keep()
    # Libraries keep caches in the home, and ask by what name the user goes.
    if not _writable(os.environ.get("HOME")):
        os.environ["HOME"] = _temporary_home()
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", str(os.getuid()))


def _open_standard_streams() -> None:
    """Without them, the next file or connection would get their numbers, and what is said would go there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _writable(home: str | None) -> bool:
    # "/" is what Docker sets where there is none; a root that can be written is no place for caches either.
    return home not in (None, "", "/") and os.access(home or "", os.W_OK | os.X_OK)


def _temporary_home() -> str:
    """The same folder after each start, unless somebody else has taken that name."""
    try:
        home = Path(tempfile.gettempdir()) / f"sdxl-runtime-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return str(home)
        return tempfile.mkdtemp(prefix="sdxl-runtime-")
    except OSError:
        return os.environ.get("HOME") or "/"  # nothing can be written anywhere: nothing will be kept


def tell(sentence: str, termination_log: Path | None) -> None:
    """Write why the server cannot run to standard error and, where the file exists, to the termination log."""
    with contextlib.suppress(OSError, ValueError):
        # In one piece, so that nothing that a thread logs meanwhile comes before the line's end.
        print(f"sdxl-runtime: {sentence}\n", end="", file=sys.stderr, flush=True)
    if termination_log is not None:
        # Nobody but the container's runtime makes this file; a pipe there must not hold us up.
        with contextlib.suppress(OSError):
            file = os.open(termination_log, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)
            try:
                os.write(file, sentence.encode("utf-8", "replace")[:MOST_BYTES])
            finally:
                os.close(file)
