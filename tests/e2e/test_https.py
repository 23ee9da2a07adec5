"""A server with a certificate: pictures, probes, slow clients and the end are as over HTTP."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.certificates import make_certificate
from tests.e2e.conftest import Server, health, running_server
from tests.waiting import until

HEADER_SECONDS = 2


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def https_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    folder = tmp_path_factory.mktemp("https")
    certificate, key = make_certificate(folder / "certificate")
    with running_server(
        folder,
        *("--ssl_certfile", str(certificate), "--ssl_keyfile", str(key)),
        *("--event_loop", request.param, "--body_timeout", str(HEADER_SECONDS)),
        verify=ssl.create_default_context(cafile=certificate),
    ) as server:
        yield server


def seconds_until_closed(connection: socket.socket) -> float:
    connection.settimeout(30)
    begun = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - begun


def test_it_paints(https_server: Server) -> None:
    assert https_server.url.startswith("https://")
    with httpx.Client(base_url=https_server.url, verify=https_server.verify, timeout=300) as client:
        body = {"prompt": "a red circle", "num_inference_steps": 1}
        answer = client.post("/v2/models/sdxl/generate", json=body)
    assert answer.status_code == 200
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert base64.b64decode(next(iter(outputs.values()))[0]).startswith(b"\x89PNG")


@pytest.mark.parametrize("by_url", [True, False], ids=["url", "environment"])
def test_it_says_how_it_is(https_server: Server, by_url: bool, tmp_path: Path) -> None:
    port = https_server.host.rpartition(":")[2]
    flags = ["--url", https_server.url] if by_url else []
    environment = {} if by_url else {"SSL_CERTFILE": "/somewhere/tls.crt", "HTTP_PORT": port}
    assert health(tmp_path, *flags, **environment) == (0, f"The server at {https_server.url} is ready.\n")


def test_who_sends_no_headers_or_agrees_on_nothing_is_left(https_server: Server) -> None:
    address = ("127.0.0.1", int(https_server.host.rpartition(":")[2]))
    assert isinstance(https_server.verify, ssl.SSLContext)
    with socket.create_connection(address) as silent:
        assert seconds_until_closed(silent) < HEADER_SECONDS + 3
    with https_server.verify.wrap_socket(socket.create_connection(address), server_hostname="127.0.0.1") as slow:
        slow.sendall(b"GET /v2 HTTP/1.1\r\nHost:")
        assert seconds_until_closed(slow) < HEADER_SECONDS + 3


def with_little_room(server: Server) -> ssl.SSLSocket:
    """A connection whose system holds next to nothing for a client that does not read."""
    assert isinstance(server.verify, ssl.SSLContext)
    plain = socket.socket()
    plain.settimeout(120)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect(("127.0.0.1", int(server.host.rpartition(":")[2])))
    return server.verify.wrap_socket(plain, server_hostname="127.0.0.1")


def ask_for_numbers(*headers: bytes) -> bytes:
    """A request for four pictures number by number: an answer of 10 MB and more that is painted in a few seconds."""
    body = (
        b'{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "parameters": '
        b'{"num_inference_steps": 1, "num_images_per_prompt": 4, "height": 512, "width": 512}, '
        b'"outputs": [{"name": "pixels"}]}'
    )
    lines = (b"POST /v2/models/sdxl/infer HTTP/1.1", b"Host: x", *headers, b"Content-Length: %d" % len(body))
    return b"\r\n".join((*lines, b"", body))


def announced_length(answer: bytes) -> int:
    """What the head of an answer says that its content has; the head came in one piece."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    (length,) = re.findall(rb"\r\ncontent-length: (\d+)", head.lower())
    assert int(length) > 10**7, "no more than the system would hold"
    return int(length)


def test_who_reads_slowly_gets_everything(https_server: Server) -> None:
    with with_little_room(https_server) as connection:
        connection.sendall(ask_for_numbers(b"Connection: close"))
        answer = connection.recv(1024)
        time.sleep(HEADER_SECONDS / 2)  # the server has written all by now, and closed
        answer += b"".join(iter(lambda: connection.recv(65536), b""))
    _, _, content = answer.partition(b"\r\n\r\n")
    assert len(content) == announced_length(answer)


def test_who_takes_nothing_of_an_answer_is_left(https_server: Server) -> None:
    with with_little_room(https_server) as connection:
        connection.sendall(ask_for_numbers())
        answer = connection.recv(1024)
        received = len(answer)
        time.sleep(3 * HEADER_SECONDS)
        with contextlib.suppress(ssl.SSLError, OSError):
            while part := connection.recv(65536):
                received += len(part)
    assert received < announced_length(answer)


def test_who_speaks_no_https_is_left_and_others_are_answered(https_server: Server) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(https_server.url.replace("https", "http"))
    assert httpx.get(f"{https_server.url}/v2", verify=https_server.verify).status_code == 200


def test_a_renewed_certificate_is_shown_to_who_comes_next(https_server: Server, tmp_path: Path) -> None:
    address = ("127.0.0.1", int(https_server.host.rpartition(":")[2]))
    command = https_server.process.args
    assert isinstance(command, list)
    new = make_certificate(tmp_path)
    for flag, path in zip(("--ssl_certfile", "--ssl_keyfile"), new, strict=True):
        shutil.copy(path, command[command.index(flag) + 1])
    expected = new[0].read_text()
    until(lambda: ssl.get_server_certificate(address) == expected, seconds=30)
    with httpx.Client(base_url=https_server.url, verify=ssl.create_default_context(cafile=new[0])) as client:
        assert client.get("/v2").status_code == 200
    https_server.verify = ssl.create_default_context(cafile=new[0])


def test_sigterm_ends_it_although_connections_are_idle(https_server: Server) -> None:
    address = ("127.0.0.1", int(https_server.host.rpartition(":")[2]))
    with (
        httpx.Client(base_url=https_server.url, verify=https_server.verify) as client,
        socket.create_connection(address),
    ):
        assert client.get("/v2").status_code == 200
        begun = time.monotonic()
        assert https_server.stop() == 0
        assert time.monotonic() - begun < 10
    assert "Traceback" not in https_server.log()
