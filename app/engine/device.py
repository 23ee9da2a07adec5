"""Running on a device: without gradients, not too far ahead of it, and with a full one reported as our own error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from app.errors import OutOfMemory

P = ParamSpec("P")
R = TypeVar("R")


def on_device(method: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients.

    Raises:
        OutOfMemory: the device is full; what the attempt had taken is free again.
    """

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with torch.inference_mode():
                return method(*args, **kwargs)
        except torch.OutOfMemoryError:
            full = "The device has too little memory for this request; ask for a smaller size or fewer images."
        # Raised outside the except block: the old traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        raise OutOfMemory(full)

    return wrapper


class Pace:
    """Keeps the host at most one forward pass ahead of the device: enough that neither waits for the other for long.

    Args:
        device: of the passes; on a CPU nobody runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Called after each pass has been handed to the device: until the pass before it is done."""
        if self._device.type != "cuda":
            return
        # Others get the core meanwhile.
        before, self._last = self._last, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._last.record(torch.cuda.current_stream(self._device))
        if before is not None:
            before.synchronize()
