"""Waiting for what somebody else brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(holds: Callable[[], bool], complaint: str = "it never happened", seconds: float = 300.0) -> None:
    """Return as soon as that holds.

    Args:
        holds: asked again and again.
        complaint: what the test fails with where it does not hold in time.
        seconds: time for it.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)
