"""How the process starts: since when, what each part of it takes, and importing at full speed. Knows no model."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PHASES = ("import", "read", "device", "compile", "warm_up")
"""What a start consists of: importing and all that is nothing else, getting the weights, placing them, compiling and
painting once."""
WORDS = {"device": "to device", "warm_up": "warm up"}


class Timeline:
    """Seconds that each phase of a start takes; one thread writes it.

    What is in no other phase counts as ``import``, from `begun` on.

    Args:
        begun: when the start began, by `clock`; now unless given.
        clock: seconds that only grow.
    """

    def __init__(self, begun: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = PHASES[0]
        self._since = clock() if begun is None else begun
        self.seconds: dict[str, float] = {PHASES[0]: 0.0}
        """By phase, up to the last change from one to another; those that there were none of are not in it."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside as `name`, one of `PHASES`; a phase inside a phase counts for itself alone."""
        outer = self._phase
        self._change(name)
        try:
            yield
        finally:
            self._change(outer)

    def _change(self, name: str) -> None:
        now = self._clock()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        """Such as ``import 3.9, read 0.4, to device 0.0, warm up 0.9``."""
        known = ((name, self.seconds[name]) for name in PHASES if name in self.seconds)
        return ", ".join(f"{WORDS.get(name, name)} {seconds:.1f}" for name, seconds in known)


def process_began() -> float:
    """When the system started this process, in the seconds of ``time.monotonic``; now where it does not tell.

    Source: proc(5): field 22 of ``/proc/self/stat``, in clock ticks since boot.
    """
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, ValueError, IndexError, AttributeError):
        return now


@contextlib.contextmanager
def importing(library: str) -> Iterator[None]:
    """Import `library`, and what comes with it, without looking for garbage.

    Modules stay for as long as the process does, and torch and diffusers make a million objects: to look through all of
    them again and again while they become more is a quarter of the time that importing takes. Later it would stop
    every thread for a tenth of a second each time, so that they are left out for good. In a process that has the
    library already nothing is done: what else lives there may become garbage.
    """
    if library in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:  # with several devices, by the first that began
            gc.enable()
