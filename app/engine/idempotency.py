"""Answers by idempotency key: a request that is sent twice is painted once. Knows no clock and no thread."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

from app.engine.ticket import Image, Ticket
from app.errors import KeyReused

MAX_BYTES = 256 * 1024 * 1024
"""Of finished pictures that wait for somebody to ask again."""
MAX_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Once:
    """What makes two requests the same.

    Attributes:
        key: chosen by the caller.
        fingerprint: of all that was sent; another one under the same key is a mistake.
    """

    key: str
    fingerprint: bytes


@dataclass(slots=True)
class _Entry:
    fingerprint: bytes
    ticket: Ticket
    size: int = 0
    until: float = math.inf


class Answers:
    """Tickets by key: those that run, and for `seconds` those that ended well. Failures are not kept: try again."""

    def __init__(self, seconds: float, most_bytes: int = MAX_BYTES) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._open: dict[str, _Entry] = {}
        self._finished: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._keys: dict[Ticket, str] = {}
        self.size = 0
        """Bytes of the finished ones."""

    def __len__(self) -> int:
        return len(self._open) + len(self._finished)

    def find(self, once: Once, now: float) -> Ticket | None:
        """The ticket of the same request.

        Raises:
            KeyReused: the key came with another request.
        """
        self.forget_old(now)
        entry = self._open.get(once.key) or self._finished.get(once.key)
        if entry is None:
            return None
        if entry.fingerprint != once.fingerprint:
            raise KeyReused("This Idempotency-Key came with another request before; take a new key for a new request.")
        return entry.ticket

    def add(self, once: Once, ticket: Ticket) -> None:
        self._open[once.key] = _Entry(once.fingerprint, ticket)
        self._keys[ticket] = once.key

    def ended(self, ticket: Ticket, well: bool, now: float) -> None:
        """Keep the answer for a while, if it is one."""
        key = self._keys.pop(ticket, None)
        if key is None:
            return
        entry = self._open.pop(key)
        if well and self._seconds > 0:
            entry.until = now + self._seconds
            entry.size = sum(map(_bytes, ticket.images))
            self.size += entry.size
            self._finished[key] = entry
        self.forget_old(now)

    def forget_old(self, now: float) -> None:
        """Let go of what was kept long enough, or is too much."""
        while self._finished:
            oldest = next(iter(self._finished.values()))
            if oldest.until > now and self.size <= self._most_bytes and len(self._finished) <= MAX_KEYS:
                return
            self._finished.popitem(last=False)
            self.size -= oldest.size


def _bytes(image: Image) -> int:
    return len(image.encoded or b"") + (len(image.pixels.data) if image.pixels else 0)
