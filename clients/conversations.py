"""What is asked and answered, as generators without I/O: they yield calls and are sent the responses.

Whoever runs one waits and talks to the server, in whatever way; see `client.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import httpx

from clients.answers import JSON_LENGTH, Result, read_object, read_result, require_ok
from clients.errors import ClientError, ServerError, UnreachableError
from clients.events import OnStep

QUICK_TIMEOUT = httpx.Timeout(10.0)
"""For answers that need no model."""
POLL_INTERVAL = 0.5
LONGEST_BACKOFF = 30.0
TRY_AGAIN = frozenset({429, 503})
"""Statuses after which the same request may succeed later."""
UNAVAILABLE = frozenset({502, 503, 504})
"""Statuses by which a server, or a gateway in front of it, says that it is not ready."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What the server takes as a request's id."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to make."""

    method: Literal["GET", "POST"]
    path: str
    timeout: httpx.Timeout
    content: bytes = b""
    json_length: int | None = None
    """Of `content`, where tensors' bytes follow its JSON."""
    request_id: str | None = None
    """By which the server knows it, where it fits into a header."""
    delay: float = 0.0
    """Seconds to wait before it."""
    on_step: OnStep | None = None
    """Told of each step where the answer is a stream of events."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For httpx's method ``request``."""
        headers = {"Content-Type": "application/json"} if self.content else {}
        if self.json_length is not None:
            headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(self.json_length)}
        if self.request_id is not None and REQUEST_ID.fullmatch(self.request_id):
            headers["X-Request-Id"] = self.request_id
        return {
            "method": self.method,
            "url": self.path,
            "timeout": self.timeout,
            "content": self.content,
            "headers": headers,
        }


Conversation = Generator[Call, httpx.Response, T]
"""Yields calls, is sent their responses or thrown `UnreachableError`, and returns what the caller wanted to know."""


def converse_infer(call: Call, retries: int) -> Conversation[Result]:
    """Make `call`, and again up to `retries` times while the server is busy or restarts.

    The server says how long to wait; where it does not, the pauses double from one second on. A longer pause than the
    caller would wait for an answer is none that the caller wants.
    """
    patience = call.timeout.read or 0.0
    for attempt in range(retries):
        pause = min(2.0**attempt, LONGEST_BACKOFF)
        try:
            return read_result((yield call))
        except UnreachableError as error:
            # What was sent may have been accepted, and would be painted twice.
            if not error.restarting or pause > patience:
                raise
        except ServerError as error:
            if error.retry_after is not None:
                pause = error.retry_after
            if error.status not in TRY_AGAIN or pause > patience:
                raise
        call = replace(call, delay=pause)
    return read_result((yield call))


def converse_object(path: str) -> Conversation[dict[str, Any]]:
    """The JSON object at `path`."""
    return read_object((yield Call("GET", path, QUICK_TIMEOUT)))


def converse_health(path: str) -> Conversation[bool]:
    """Whether the answer at `path` is yes; no answer is a no."""
    try:
        response = yield Call("GET", path, QUICK_TIMEOUT)
    except UnreachableError:
        return False
    if response.status_code in UNAVAILABLE:
        return False
    require_ok(response)
    return True


def converse_wait(path: str, timeout: float) -> Conversation[None]:
    """Ask at `path` until the answer is yes; after `timeout` seconds, raise what the last answer said."""
    deadline = time.monotonic() + timeout
    call = Call("GET", path, QUICK_TIMEOUT)
    while True:
        try:
            require_ok((yield call))
        except ClientError as error:
            hopeless = isinstance(error, ServerError) and error.status not in UNAVAILABLE
            if hopeless or time.monotonic() + POLL_INTERVAL > deadline:
                raise
        else:
            return
        call = replace(call, delay=POLL_INTERVAL)
