"""HTTPS: reads the server's certificate, says what is wrong with it before anything else starts, and renews it."""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Never

from app.errors import InvalidSettings

logger = logging.getLogger(__name__)

NO_CHECK_TIME = 0x200000
"""OpenSSL's ``X509_V_FLAG_NO_CHECK_TIME``, for which the module ssl has no name."""


class OneSided(ssl.SSLObject):
    """A connection that says that it ends, and does not wait for the client to say so too.

    Clients that keep an idle connection do not look at it, and would hold up the server's end for half a minute. Who
    has not read everything yet is waited for.

    Attributes:
        unsent: what the client has still to take.
    """

    unsent: ssl.MemoryBIO

    def unwrap(self) -> None:
        waits = self.unsent.pending > 0
        try:
            super().unwrap()
        except ssl.SSLWantReadError:
            if waits:
                raise


class Certificate(ssl.SSLContext):
    """The server's certificate, for connections that end as `OneSided` says.

    Attributes:
        files: it and its key.
    """

    sslobject_class = OneSided
    files: tuple[Path, Path]
    _seen: object = None
    _taken: object = None

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *rest: Any, **named: Any) -> ssl.SSLObject:
        connection = super().wrap_bio(incoming, outgoing, *rest, **named)
        assert isinstance(connection, OneSided)
        connection.unsent = outgoing
        return connection

    def renew(self) -> None:
        """Take the files anew if they have changed since the last but one call, for connections from now on.

        What cannot be used is told in the log, and changes nothing.
        """
        stamp = _stamp(self.files)
        is_settled, self._seen = stamp == self._seen, stamp
        if not is_settled or stamp == self._taken:  # one of the two may still be on its way
            return
        self._taken = stamp
        certfile, keyfile = self.files
        try:
            read_certificate(certfile, keyfile)  # by itself first: with a key that does not fit, none would be left
            self.load_cert_chain(certfile, keyfile)
        except (InvalidSettings, OSError) as error:
            logger.error("a new certificate is not taken, and clients get the one before: %s", error)
        else:
            logger.info("took the new certificate in %s", certfile)


def _stamp(files: Iterable[Path]) -> object:
    """What changes with what is in the files."""
    stamps = []
    for path in files:
        with contextlib.suppress(OSError):
            status = path.stat()
            stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return stamps


def read_certificate(certfile: Path, keyfile: Path) -> Certificate:
    """What to serve HTTPS with.

    Raises:
        InvalidSettings: a file cannot be read, is not what it should be, or they do not belong together.
    """
    for flag, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        try:
            path.read_bytes()
        except OSError as error:
            raise InvalidSettings(
                f"--{flag} is {path}, which cannot be read ({error.strerror}); name a file that the server may read."
            ) from None

    def locked() -> Never:
        # Otherwise OpenSSL asks at the terminal.
        raise InvalidSettings(f"--ssl_keyfile is {keyfile}, which asks for a password; name a key without one.")

    stamp = _stamp((certfile, keyfile))
    _check_certificate(certfile)
    context = Certificate(ssl.PROTOCOL_TLS_SERVER)
    context.files, context._seen, context._taken = (certfile, keyfile), stamp, stamp
    try:
        context.load_cert_chain(certfile, keyfile, locked)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidSettings(
                f"--ssl_keyfile is {keyfile}, which is not the key of the first certificate in {certfile}; name the "
                "two that belong together, the server's own certificate before those that lead to its root."
            ) from None
        # Also certificates that are too weak for this OpenSSL are refused here.
        reason = (error.reason or "unknown").lower().replace("_", " ")
        blamed = "ssl_certfile" if "ee key" in reason or "ca md" in reason else "ssl_keyfile"
        path, what = (certfile, "certificate") if blamed == "ssl_certfile" else (keyfile, "private key")
        raise InvalidSettings(
            f"--{blamed} is {path}, which holds no {what} that can be used ({reason}); name one in PEM format."
        ) from None
    _check_time(certfile, context)
    return context


def _check_time(certfile: Path, context: ssl.SSLContext) -> None:
    """Warn of a certificate that clients will refuse; its dates are read as a client does that does not mind them."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    client.load_verify_locations(certfile)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs, ours = client.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    for side in (theirs, ours) * 3:
        with contextlib.suppress(ssl.SSLError):  # among them that it waits for the other side
            side.do_handshake()
    try:
        dates: Any = theirs.getpeercert()
    except ValueError:  # not for a server: clients that mind will say so
        return
    if time.time() > ssl.cert_time_to_seconds(dates["notAfter"]):
        wrong = f"has expired on {dates['notAfter']}"
    elif time.time() < ssl.cert_time_to_seconds(dates["notBefore"]):
        wrong = f"is not valid before {dates['notBefore']}"
    else:
        return
    logger.warning("--ssl_certfile is %s, which %s; clients will refuse it, so name one that is valid", certfile, wrong)


def _check_certificate(certfile: Path) -> None:
    """OpenSSL itself does not say which of the two files is wrong."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certfile)
    except ssl.SSLError:
        raise InvalidSettings(
            f"--ssl_certfile is {certfile}, which holds no certificate that can be used; name one in PEM format."
        ) from None
