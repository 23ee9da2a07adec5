"""A streamed answer, from bytes to steps and, in the end, to the response that an answer in one piece would have been.

Source: the HTML standard, "Server-sent events".
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

OnStep = Callable[[int, int], None]
"""Called with the steps that are done and those that there are; both are of all pictures of a request."""
MEDIA_TYPE = "text/event-stream"


@dataclass(slots=True)
class StreamReader:
    """Reads events as their bytes come.

    Args:
        on_step: is told of each step.
        timeout: seconds from now within which the answer must begin to come; events before it are none.
    """

    on_step: OnStep
    timeout: float = math.inf
    _begun: float = field(default_factory=time.monotonic)
    _response: httpx.Response | None = None
    _pending: list[bytes] = field(default_factory=list)
    _fields: dict[str, str] = field(default_factory=dict)

    def feed(self, data: bytes) -> None:
        """Take the next bytes, wherever they are cut.

        Raises:
            httpx.ReadTimeout: the answer has not begun, and its time is over.
        """
        *lines, rest = data.split(b"\n")
        if lines:
            # Put together once, however many pieces a line came in: that of a picture has megabytes.
            lines[0] = b"".join([*self._pending, lines[0]])
            self._pending = []
        self._pending.append(rest)
        for line in lines:
            self._line(line.removesuffix(b"\r").decode("utf-8", "replace"))
        is_answer = self._response is not None or self._fields.get("event") == "done"
        if not is_answer and time.monotonic() - self._begun > self.timeout:
            raise httpx.ReadTimeout("")

    def finish(self) -> httpx.Response:
        """The answer.

        Raises:
            httpx.RemoteProtocolError: the stream ended before it was there.
        """
        if self._response is None:
            raise httpx.RemoteProtocolError("the stream ended without an answer")
        return self._response

    def _line(self, line: str) -> None:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            self._fields[name] = f"{self._fields[name]}\n{value}" if name == "data" and name in self._fields else value
            return
        fields, self._fields = self._fields, {}
        if "data" in fields:
            self._event(fields.get("event", "message"), fields["data"])

    def _event(self, name: str, data: str) -> None:
        if name == "done":
            self._response = httpx.Response(200, content=data.encode(), headers={"Content-Type": "application/json"})
            return
        steps: tuple[int, int] | None = None
        try:
            fields: Any = json.loads(data)
            if name == "step":
                steps = int(fields["step"]), int(fields["steps"])
            elif name == "error":
                self._response = httpx.Response(int(fields["status"]), json={"error": str(fields["error"])})
        except (ValueError, KeyError, TypeError):
            self._response = httpx.Response(
                502, json={"error": f"The server sent an event that makes no sense: {name}."}
            )
        # What the caller's own function raises is no fault of the server's.
        if steps is not None:
            self.on_step(*steps)
