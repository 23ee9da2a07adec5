"""Running on a device: without gradients, and with a full device reported as our own error."""

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
