"""What can go wrong for a client."""

from __future__ import annotations


class ClientError(Exception):
    """Base of all; `str()` is one sentence for the person who reads it."""


class UnreachableError(ClientError):
    """Nobody answered: wrong address, connection refused or broken, time over.

    Args:
        message: one sentence.
        restarting: a server that has answered before takes no connection, so nothing was sent.
    """

    def __init__(self, message: str, *, restarting: bool = False) -> None:
        super().__init__(message)
        self.restarting = restarting


class ServerError(ClientError):
    """The server answered, but not with what was asked for.

    Args:
        status: of HTTP; 200 when the answer cannot be understood.
        message: the server's own sentence where it has one.
        retry_after: seconds after which to try again, where the server names them.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
