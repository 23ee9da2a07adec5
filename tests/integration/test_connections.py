"""Connections of clients that do not behave: who leaves, who does not read, who sends early or too much."""

from __future__ import annotations

import fcntl
import http.client
import itertools
import json
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from app.api.server import EVENTS_AT_A_TIME
from app.main import _listen
from app.settings import Settings
from tests.fakes import Gated, Instant
from tests.integration.test_server import BODY, INFER, WAIT, Running, running
from tests.waiting import until

LARGE = {
    **BODY,
    "parameters": {"width": 2048, "height": 2048},
    "outputs": [{"name": "pixels", "parameters": {"binary_data": True}}],
}
"""Its answer has 12 MB, more than find room on the way."""
SMALL = {**LARGE, "parameters": {"width": 64, "height": 64}}
"""Its answer has 12 kB, which the system takes at once."""


def raw(each: Running, body: object = BODY) -> socket.socket:
    """A connection on which a request was sent whole."""
    connection = socket.create_connection(("127.0.0.1", each.port), WAIT)
    send(connection, body)
    return connection


def send(connection: socket.socket, body: object) -> None:
    content = json.dumps(body).encode()
    connection.sendall(b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(content)))
    connection.sendall(content)


@pytest.fixture
def gated() -> Iterator[Gated]:
    family = Gated()
    yield family
    family.permit(1000)


@pytest.mark.parametrize("early", [b"", b"\r\n", b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n"])
def test_who_leaves_is_noticed_whatever_came_behind_the_request(gated: Gated, early: bytes) -> None:
    with running(lambda: gated) as each:
        with raw(each) as connection:
            assert gated.waiting.wait(WAIT)
            if early:
                connection.sendall(early)
                time.sleep(0.2)
        until(lambda: 'sdxl_cancelled_total{model_name="m"} 1.0' in each.get("/metrics").text, seconds=WAIT)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_empty_line_behind_the_last_request_of_a_connection_costs_nobody_a_picture(
    gated: Gated, version: str
) -> None:
    """As microcontrollers send it, whose last line is the body."""
    content = json.dumps(BODY)
    head = f"POST {INFER} HTTP/{version}\r\nHost: h\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    with running(lambda: gated) as each, socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
        connection.sendall(head.encode() + content.encode())
        assert gated.waiting.wait(WAIT)
        connection.sendall(b"\r\n")
        time.sleep(0.2)
        gated.permit(1000)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 200 and json.load(answer)["outputs"]


def test_requests_that_come_early_are_answered_in_their_order_however_many_they_are(gated: Gated) -> None:
    count = 3000
    with running(lambda: gated) as each, raw(each) as connection:
        assert gated.waiting.wait(WAIT)
        sent = each.pool.submit(connection.sendall, b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n" * count)
        gated.permit(1000)
        answer = b""
        while answer.count(b'{"live": true}') < count:
            part = connection.recv(1 << 20)
            assert part, answer[-200:]
            answer += part
        sent.result(WAIT)
        assert answer.index(b'"outputs"') < answer.index(b'{"live": true}')


def test_a_body_with_two_lengths_is_the_last_that_its_connection_brings() -> None:
    """A proxy that goes by the other length takes what is left of the body for somebody else's request, or the other
    way round: RFC 9112, 6.1."""
    content = json.dumps(BODY).encode()
    head = b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    hidden = b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n"
    with running(Instant) as each, socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
        connection.sendall(head % (INFER.encode(), len(body + hidden)) + body + hidden)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK") and b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1


def chunked(body: bytes) -> bytes:
    """A request whose body comes byte by byte."""
    head = b"POST %s HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
    return head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Client and server share this process, and neither leaves it to the other for long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_a_body_in_tiny_chunks_keeps_nobody_else_waiting() -> None:
    body = b" " * 60_000 + json.dumps(BODY).encode()
    with running(Instant) as each, socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
        sent = each.pool.submit(connection.sendall, chunked(body))
        read = each.pool.submit(connection.recv, 1 << 16)
        answered = 0
        while not read.done():
            assert each.client.get("/v2/health/live").status_code == 200
            answered += 1
        sent.result(WAIT)
        assert read.result().startswith(b"HTTP/1.1 200 OK")
        # It is parsed for more than a second. All that was read at once would come before anybody else: 40,000 chunks.
        assert answered > 20


def test_a_body_of_any_number_of_chunks_is_read_to_its_end() -> None:
    content = json.dumps(BODY).encode()
    with running(Instant) as each, socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
        most = EVENTS_AT_A_TIME
        for count in (*range(most - 4, most + 5), *range(2 * most - 4, 2 * most + 5)):
            connection.sendall(chunked(content.ljust(count)))
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200 and json.load(answer)["outputs"], count


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_all_addresses_of_ipv6_are_those_of_ipv4_too() -> None:
    with _listen(Settings(host="::", http_port=0)) as listener:
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, listener.getsockname()[1]), WAIT).close()
    with _listen(Settings(host="::1", http_port=0)) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), WAIT)


def test_the_second_part_of_an_answer_does_not_wait_for_the_client_to_confirm_the_first() -> None:
    with (
        _listen(Settings(host="127.0.0.1", http_port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_who_takes_nothing_of_an_answer_is_left_and_who_reads_slowly_is_not() -> None:
    with running(Instant, body_timeout=3.0) as each, raw(each, LARGE):
        connections = each.server.server_state.connections
        with raw(each, LARGE) as slow:
            head = b""
            while b"\r\n\r\n" not in head:
                byte = slow.recv(1)
                assert byte, head
                head += byte
            left = int(head.lower().split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
            for pause in itertools.chain([0.25] * 30, itertools.repeat(0)):
                part = slow.recv(65536)
                assert part, f"the connection was closed with {left} bytes to come"
                left -= len(part)
                if not left:
                    break
                time.sleep(pause)
        until(lambda: not connections, seconds=WAIT)


def test_a_client_that_takes_all_at_last_may_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, taken = threading.Event(), threading.Event()
    look = fcntl.ioctl

    def look_and_have_all_taken(descriptor: int, what: int, room: bytes) -> bytes:
        """The client takes the whole answer right behind the server's first look at what it has not taken."""
        seen = look(descriptor, what, room)
        if what == termios.TIOCOUTQ and any(seen) and not looked_at.is_set():
            looked_at.set()
            assert taken.wait(WAIT)
            until(lambda: not any(look(descriptor, what, room)), seconds=WAIT)
        return seen

    monkeypatch.setattr(fcntl, "ioctl", look_and_have_all_taken)
    with running(Instant, body_timeout=1.0) as each, socket.socket() as connection:
        connection.settimeout(WAIT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", each.port))
        send(connection, SMALL)
        assert looked_at.wait(WAIT)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert len(answer.read()) > 8192
        taken.set()
        time.sleep(2.0)  # longer than a client may take nothing
        send(connection, SMALL)
        again = http.client.HTTPResponse(connection)
        again.begin()
        assert again.status == 200


def test_who_reads_nothing_does_not_hold_up_the_end() -> None:
    with running(Instant, body_timeout=0.5, grace_period=600.0) as each, raw(each, LARGE):
        connections = each.server.server_state.connections
        until(lambda: any(one.transport.get_write_buffer_size() for one in list(connections)), seconds=WAIT)
        each.signal()
        assert each.ended()


def test_a_client_that_sends_a_large_body_to_a_server_that_ends_reads_why_not(gated: Gated) -> None:
    with running(lambda: gated) as each:
        accepted = each.pool.submit(each.post, INFER, BODY)
        assert gated.waiting.wait(WAIT)
        each.signal()
        each.until("/v2/health/ready", 503)
        client = http.client.HTTPConnection("127.0.0.1", each.port, timeout=WAIT)
        client.request("POST", INFER, b" " * 6_000_000)
        answer = client.getresponse()
        assert (answer.status, json.load(answer)) == (
            503,
            {"error": "The server is shutting down and takes no more requests."},
        )
        gated.permit(1000)
        assert accepted.result(WAIT).status_code == 200


def test_who_asks_for_http_2_is_answered_without_a_word_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with running(Instant) as each:
        headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
        assert each.client.get("/v2/health/live", headers=headers).json() == {"live": True}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("line", [f"POST {INFER}", "POST /elsewhere", "HEAD /elsewhere"])
def test_a_body_that_is_no_http_is_told_so_and_nothing_fails_for_it(
    line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(Instant) as each, socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
        connection.sendall(b"%s HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nno\r\n" % line.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n" if line.startswith("HEAD") else b'HTTP request that can be understood."}')
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("path", "size", "status", "option"),
    [
        ("/v2/models/other/infer", 30_000_000, 404, "close"),
        ("/elsewhere", 30_000_000, 404, "TE, Close"),
        (INFER, 100_000_000, 413, "close"),
    ],
)
def test_who_sends_all_before_it_looks_finds_its_answer_on_a_connection_that_is_to_be_closed(
    path: str, size: int, status: int, option: str
) -> None:
    with running(Instant) as each:
        connection = http.client.HTTPConnection("127.0.0.1", each.port, timeout=WAIT)
        connection.request("POST", path, bytes(size), {"Connection": option})
        answer = connection.getresponse()
        assert answer.status == status and json.load(answer)["error"]
        assert answer.getheader("connection") == "close"


def test_who_speaks_http_1_0_and_sends_all_before_it_looks_finds_its_answer() -> None:
    with running(Instant) as each, socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
        connection.sendall(b"POST /elsewhere HTTP/1.0\r\nContent-Length: 30000000\r\n\r\n" + bytes(30_000_000))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 404 and json.load(answer)["error"]


def test_who_waits_for_room_in_vain_and_sends_all_before_it_looks_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.api.bodies.AT_A_TIME", 0)
    with running(Instant, body_timeout=0.5) as each:
        connection = http.client.HTTPConnection("127.0.0.1", each.port, timeout=WAIT)
        connection.request("POST", INFER, bytes(30_000_000), {"Connection": "close"})
        answer = connection.getresponse()
        assert answer.status == 429 and answer.getheader("retry-after") and json.load(answer)["error"]


def test_who_sends_all_before_it_looks_finds_its_answer_while_the_server_ends(gated: Gated) -> None:
    with running(lambda: gated) as each, raw(each):
        assert gated.waiting.wait(WAIT)
        each.signal()
        each.until("/v2/health/ready", 503)
        connection = http.client.HTTPConnection("127.0.0.1", each.port, timeout=WAIT)
        connection.request("POST", INFER, bytes(30_000_000))
        answer = connection.getresponse()
        assert answer.status == 503 and "takes no more requests" in json.load(answer)["error"]
        gated.permit(1000)


def test_a_body_that_nobody_needs_is_waited_for_no_longer_than_any_other() -> None:
    with running(Instant, body_timeout=1.0) as each:
        for part in (b"", b"{"):
            with socket.create_connection(("127.0.0.1", each.port), WAIT) as connection:
                connection.sendall(
                    b"POST /elsewhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 9\r\n\r\n"
                )
                connection.sendall(part)
                started = time.monotonic()
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert answer.status == 404 and json.load(answer)["error"]
                assert time.monotonic() - started < 0.5
                assert connection.recv(1) == b""
                assert 0.5 < time.monotonic() - started < 30
