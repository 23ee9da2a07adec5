"""Running on a device: without gradients, without waiting for it, not too far ahead of it, and with a full one reported
as our own error."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode

from app.engine.faults import FULL
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
            pass
        # Raised outside the except block: the old traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        raise OutOfMemory(FULL)

    return wrapper


def sending(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, what the host makes for `device` gets there without the host waiting until the device has come to it.

    Schedulers draw noise and make small tables on the host, in the middle of steps. Sent as PyTorch does it, from
    memory that may be paged out, each would wait for all that the device has still to do. So would the equations that
    they solve on the device, which PyTorch wants to know solvable.

    Not for modules: their weights would all be copied once more, and what is compiled is not known again inside.
    """
    return _Sending() if device.type == "cuda" else contextlib.nullcontext()


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Normal noise of `shape` on `device`, drawn on the host: a seed means the same picture on every device.

    Args:
        generator: of the host.
    """
    with sending(device):
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return noise


class _Sending(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and _is_gpu(kwargs.get("device")):
            made: torch.Tensor = func(*args, **{**kwargs, "device": "cpu"})
            return made.pin_memory().to(kwargs["device"], non_blocking=True)
        if func is torch.Tensor.to and not args[0].is_cuda and any(map(_is_gpu, (*args[1:], kwargs.get("device")))):
            return func(args[0].pin_memory(), *args[1:], **{**kwargs, "non_blocking": True})
        if func is torch.linalg.solve and args[0].is_cuda:
            return torch.linalg.solve_ex(*args, **kwargs)[0]
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, torch.device | str) and torch.device(device).type == "cuda"


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

    def catch_up(self) -> None:
        """Until the last pass is done."""
        if self._last is not None:
            self._last.synchronize()
