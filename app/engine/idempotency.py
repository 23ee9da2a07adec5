"""Answers by idempotency key: a request that is sent twice is painted once. Knows no clock and no thread."""

from __future__ import annotations

from dataclasses import dataclass

from app.engine.ticket import Ticket
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
    until: float = float("inf")


class Answers:
    """Tickets by key: those that run, and for `seconds` those that ended well. Failures are not kept: try again."""

    def __init__(self, seconds: float, most_bytes: int = MAX_BYTES) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._entries: dict[str, _Entry] = {}
        self._keys: dict[Ticket, str] = {}
        self.size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, once: Once, now: float) -> Ticket | None:
        """The ticket of the same request.

        Raises:
            KeyReused: the key came with another request.
        """
        self._forget_old(now)
        entry = self._entries.get(once.key)
        if entry is None:
            return None
        if entry.fingerprint != once.fingerprint:
            raise KeyReused("This Idempotency-Key came with another request before; take a new key for a new request.")
        return entry.ticket

    def add(self, once: Once, ticket: Ticket) -> None:
        self._entries[once.key] = _Entry(once.fingerprint, ticket)
        self._keys[ticket] = once.key

    def ended(self, ticket: Ticket, well: bool, now: float) -> None:
        """Keep the answer for a while, if it is one."""
        key = self._keys.get(ticket)
        if key is None:
            return
        if not well or self._seconds <= 0:
            self._drop(key)
            return
        entry = self._entries.pop(key)
        entry.until = now + self._seconds
        entry.size = sum(len(image.encoded or b"") + len(image.pixels.data if image.pixels else b"") for image in
                         ticket.images)  # fmt: skip
        self.size += entry.size
        self._entries[key] = entry  # behind the others: finished entries stand in the order of their end
        self._forget_old(now)

    def _forget_old(self, now: float) -> None:
        finished = [(key, entry) for key, entry in self._entries.items() if entry.until != float("inf")]
        for key, entry in finished:
            if entry.until > now and self.size <= self._most_bytes and len(self._entries) <= MAX_KEYS:
                break
            self._drop(key)

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key)
        self.size -= entry.size
        del self._keys[entry.ticket]
