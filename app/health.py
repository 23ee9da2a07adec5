"""``sdxl-runtime health``: asks the server on this machine how it is, in a moment, for a container's health check.

Imports next to nothing, and does not read the settings as the server does: those imports take a second.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

DEFAULT_PORTS = {"http": "8080", "https": "8443"}
SECONDS = 5.0


def main(arguments: Sequence[str]) -> int:
    """Ask, print one sentence, and return 0 if the answer is yes, 1 if it is no or there is none."""
    parser = argparse.ArgumentParser(
        prog="sdxl-runtime health",
        description="Ask a running server how it is: exit code 0 when it is, 1 when it is not.",
        allow_abbrev=False,
    )
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--ready", action="store_true", help="is every model ready? (asked unless told otherwise)")
    question.add_argument("--live", action="store_true", help="is the server alive?")
    parser.add_argument("--http_port", "--http-port", metavar="N", help="port of the server (default: as it reads it)")
    parser.add_argument("--url", help="address of the server (default: this machine, http or https as it reads it)")
    options = parser.parse_args(arguments)
    asked = "live" if options.live else "ready"
    env_file = Path(".env")
    try:
        url = options.url or local_url(options.http_port, os.environ, env_file)
    except (OSError, UnicodeDecodeError) as error:
        well, sentence = False, f"{env_file} cannot be read: {error}."
    else:
        well, sentence = ask(url, asked)
    print(sentence, file=sys.stdout if well else sys.stderr)
    return 0 if well else 1


def local_url(port: str | None, environment: Mapping[str, str], env_file: Path) -> str:
    """Where the server on this machine listens, by the same environment and ``.env`` file that it reads."""
    certificate = _setting("SSL_CERTFILE", environment, env_file, "KSERVE_TLS_CERT_FILE")
    scheme = "http" if (certificate or "none").lower() == "none" else "https"
    return f"{scheme}://{_host(_setting('HOST', environment, env_file))}:" + (
        port or _setting("HTTP_PORT", environment, env_file) or DEFAULT_PORTS[scheme]
    )


def _host(listens_on: str | None) -> str:
    if listens_on in (None, "", "0.0.0.0"):  # noqa: S104
        return "127.0.0.1"
    return in_url("::1" if listens_on == "::" else listens_on)


def in_url(host: str) -> str:
    """As a URL has it, IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _setting(name: str, environment: Mapping[str, str], env_file: Path, alias: str = "") -> str | None:
    """By the settings' rules: an empty value leaves it to the next, and a Service's address is not meant for us."""
    for pairs in _sources(environment, env_file):
        value = (pairs.get(name) or "").strip() or (pairs.get(alias) or "").strip()
        if value and not value.startswith("tcp://"):
            return value
    return None


def _sources(environment: Mapping[str, str], env_file: Path) -> Iterator[Mapping[str, str | None]]:
    yield environment
    if env_file.is_file():
        from dotenv import dotenv_values

        yield dotenv_values(env_file, interpolate=False)


def ask(url: str, asked: str) -> tuple[bool, str]:
    """Whether the server is ``live`` or ``ready``, and a sentence about it."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname if parts.scheme in ("http", "https") else None, parts.port
    except ValueError:
        host = None
    if not host:
        return False, f"{url} is no address such as http://127.0.0.1:8080."
    try:
        # Not by urllib, which would ask a proxy where the environment names one.
        connection = _connection(parts.scheme, host, port)
        connection.request("GET", f"{parts.path.rstrip('/')}/v2/health/{asked}", headers={"Connection": "close"})
        answer = connection.getresponse()
        content = answer.read(100_000)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return False, f"The server at {url} does not answer ({reason or type(error).__name__})."
    if answer.status == http.HTTPStatus.OK:
        return True, f"The server at {url} is {asked}."
    return False, f"The server at {url} is not {asked}: {_reason(answer.status, content)}"


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=SECONDS)
    # The machine asks itself, by an address that its certificate does not name, and sends nothing secret.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)


def _reason(status: int, content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}."
