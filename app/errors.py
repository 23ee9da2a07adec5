"""Everything that can go wrong, as one tree.

A class says what happened, never how a transport reports it: `api/edge.py` has the only table from code to status.

    RuntimeFault
    ├── InvalidRequest            the request cannot be served as it is; the sentence says what to change
    ├── Unauthorized              no key, or not the right one
    ├── ModelNotFound             no model of that name or version
    ├── RequestNotFound           no request of that id runs, and none did lately
    ├── KeyReused                 an idempotency key that came with another request before
    ├── BodyTooLarge              more bytes than the server reads
    ├── BodyTooSlow               the client stopped sending before the body was whole
    ├── UnsupportedEncoding       a content encoding that is not spoken here
    ├── Unavailable               try again later
    │   ├── ModelNotReady         still loading, or failed
    │   ├── Overloaded            no room for it now; knows how long to wait
    │   └── ShuttingDown          the server no longer takes requests
    ├── GenerationFailed          an accepted request that ends without a picture
    │   ├── Cancelled             the client left or said stop
    │   ├── DeadlineExceeded      its time was up
    │   ├── OutOfMemory           the device could not hold it
    │   └── DeviceLost            the device is in a state that only a restart mends
    └── StartupError              the server cannot start as configured
        ├── InvalidSettings       a flag, environment variable or .env key
        └── ModelLoadFailed       the weights
"""

from __future__ import annotations


class RuntimeFault(Exception):
    """Base of all; `str()` is one sentence for the person who reads it."""

    code = "internal"


class InvalidRequest(RuntimeFault):
    code = "invalid_request"


class Unauthorized(RuntimeFault):
    code = "unauthorized"


class ModelNotFound(RuntimeFault):
    code = "model_not_found"


class RequestNotFound(RuntimeFault):
    code = "request_not_found"


class KeyReused(RuntimeFault):
    code = "key_reused"


class BodyTooLarge(RuntimeFault):
    code = "body_too_large"


class BodyTooSlow(RuntimeFault):
    code = "body_too_slow"


class UnsupportedEncoding(RuntimeFault):
    code = "unsupported_encoding"


class Unavailable(RuntimeFault):
    code = "unavailable"


class ModelNotReady(Unavailable):
    code = "model_not_ready"


class Overloaded(Unavailable):
    """There is no room for it now, in the queue or in memory.

    Args:
        message: one sentence.
        retry_after: seconds after which a place is likely to be free.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(Unavailable):
    code = "shutting_down"

    def __init__(self, message: str = "The server is shutting down and takes no more requests.") -> None:
        super().__init__(message)


class GenerationFailed(RuntimeFault):
    code = "generation_failed"


class Cancelled(GenerationFailed):
    code = "cancelled"


class DeadlineExceeded(GenerationFailed):
    code = "deadline_exceeded"


class OutOfMemory(GenerationFailed):
    code = "out_of_memory"


class DeviceLost(GenerationFailed):
    code = "device_lost"


class StartupError(RuntimeFault):
    code = "startup"


class InvalidSettings(StartupError):
    code = "invalid_settings"


class ModelLoadFailed(StartupError):
    code = "model_load_failed"


def first_line(error: BaseException) -> str:
    """What an error of others says, short enough for a sentence of ours."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0].strip().rstrip(".:")
