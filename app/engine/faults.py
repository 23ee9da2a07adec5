"""What went wrong on the device, as one of our own errors. Reads messages, so that it need not import torch."""

from __future__ import annotations

import logging

from app.errors import DeviceLost, GenerationFailed, OutOfMemory, RuntimeFault

logger = logging.getLogger(__name__)

REFUSED = (
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_INVALID_VALUE",
    "invalid configuration argument",
    "invalid argument",
)
"""What CUDA says of a call that it does not begin with: the context stays whole, and only who asked for it fails.

Source: cudaError_t in CUDA's runtime API, which says where an error means that the process must be relaunched.
"""

LOST = "The device failed and the server must be restarted; the request may be sent again then."
FULL = "The device has too little memory for this request; ask for a smaller size or fewer images."


def as_fault(error: Exception) -> RuntimeFault:
    """What a family raised, as one of ours and without its traceback, which would keep tensors alive.

    Returns:
        `OutOfMemory` for a full device, `DeviceLost` where the CUDA context is beyond repair: every further call
        would fail. Anything else is a `GenerationFailed`; the caller logs it.
    """
    if isinstance(error, RuntimeFault):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    kind, text = type(error).__name__, str(error)
    if kind == "DistBackendError":  # another GPU, or the way to it; its message may speak of memory
        logger.critical("the other devices are lost", exc_info=error)
        return DeviceLost(LOST)
    full = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(part in text for part in full):
        return OutOfMemory(FULL)
    broken = kind == "AcceleratorError" or "CUDA error" in text or "HIP error" in text
    if broken and not any(part in text for part in REFUSED):
        logger.critical("the device is lost", exc_info=error)
        return DeviceLost(LOST)
    return GenerationFailed(f"The generation failed inside the model ({kind}); the server's log says more.")
