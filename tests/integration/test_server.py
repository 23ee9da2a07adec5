"""The end of a server over real sockets: who is answered, who is refused, and when it is over."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn

from app.api import server
from app.api.server import Connection, Server
from app.engine.family import Family
from app.errors import InvalidSettings
from app.main import _listen, _make_server, create_app
from app.settings import Settings
from tests.fakes import Gated, Instant

INFER = "/v2/models/m/infer"
PREDICT = "/v1/models/m:predict"
BODY = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a cat"]}]}
INSTANCES = {"instances": [{"prompt": "a cat"}]}
WAIT = 60.0


class Running:
    """A server in a thread, and a pool of clients."""

    def __init__(self, settings: Settings, load: Callable[[], Family[Any]]) -> None:
        listener = _listen(settings)
        self.port = listener.getsockname()[1]
        app = create_app(settings, load=load)
        http = partial(Connection, timeout=settings.body_timeout)
        config = uvicorn.Config(app, http=http, ws="none", log_config=None)  # type: ignore[arg-type]
        self.server = Server(config, app.state.stop, app.state.hurry, settings.grace_period)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=WAIT)
        self.pool = ThreadPoolExecutor(8)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=WAIT)

    def post(self, path: str, content: Any) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}{path}", json=content, timeout=WAIT)

    def signal(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)

    def until(self, path: str, status: int) -> httpx.Response:
        for _ in range(10_000):
            answer = self.get(path)
            if answer.status_code == status:
                return answer
        raise AssertionError(f"{path} never answered {status}")

    def images(self) -> float:
        """Accepted images, waiting or running."""
        names = ("sdxl_pending_images", "sdxl_running_images")
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))

    def ended(self) -> bool:
        self.thread.join(WAIT)
        return not self.thread.is_alive()


@contextmanager
def running(load: Callable[[], Family[Any]], **settings: Any) -> Iterator[Running]:
    options: dict[str, Any] = {"model_name": "m", "warm_up": False, "grace_period": WAIT, **settings}
    options |= {"host": "127.0.0.1", "http_port": 0}
    each = Running(Settings(**options), load)
    each.thread.start()
    try:
        each.until("/v2/health/ready", 200)
        yield each
    finally:
        each.signal()
        each.signal()
        assert each.ended()
        each.client.close()
        each.pool.shutdown()


@pytest.fixture
def family() -> Iterator[Gated]:
    gated = Gated()
    yield gated
    gated.permit(1000)


def test_after_the_signal_what_runs_is_finished_and_all_else_is_told_no(family: Gated) -> None:
    with running(lambda: family) as each:
        accepted = [each.pool.submit(each.post, path, body) for path, body in ((INFER, BODY), (PREDICT, INSTANCES))]
        assert family.waiting.wait(WAIT)
        while each.images() < 2:
            pass
        kept_alive = each.client.get("/v2/health/ready")
        assert kept_alive.status_code == 200
        each.signal()

        ready = each.until("/v2/health/ready", 503)
        assert ready.json() == {"ready": False, "error": "Not every model is ready: m is shutting down."}
        assert each.get("/v2/health/live").json() == {"live": True}
        assert each.get("/").json() == {"status": "alive"}
        assert each.get("/v1/models/m").status_code == each.get("/v2/models/m/ready").status_code == 503
        assert 'sdxl_model_ready{model_name="m"} 0.0' in each.get("/metrics").text
        for path, body in ((INFER, BODY), (PREDICT, INSTANCES)):
            for refused in (each.post(path, body), each.client.post(path, json=body)):
                assert refused.status_code == 503
                assert refused.headers["connection"] == "close"
                assert refused.json() == {"error": "The server is shutting down and takes no more requests."}
        assert not any(request.done() for request in accepted)

        family.permit(1000)
        answers = [request.result(WAIT) for request in accepted]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["outputs"][0]["data"] and answers[1].json()["predictions"]
        assert each.ended()
        with pytest.raises(httpx.ConnectError):
            each.get("/v2/health/live")


def test_what_takes_longer_than_the_grace_period_is_told_so_and_the_server_ends(family: Gated) -> None:
    with running(lambda: family, grace_period=1.0) as each:
        accepted = each.pool.submit(each.post, INFER, BODY)
        assert family.waiting.wait(WAIT)
        each.signal()
        answer = accepted.result(WAIT)
        assert answer.status_code == 503 and answer.headers["connection"] == "close"
        assert answer.json() == {"error": "The server shut down before the request was done."}
        assert each.ended()


def test_a_second_signal_ends_at_once_what_the_grace_period_would_let_run(family: Gated) -> None:
    with running(lambda: family, grace_period=3600.0) as each:
        accepted = each.pool.submit(each.post, INFER, BODY)
        assert family.waiting.wait(WAIT)
        each.signal()
        each.until("/v2/health/ready", 503)
        assert not accepted.done()
        each.signal()
        answer = accepted.result(WAIT)
        assert answer.status_code == 503
        assert answer.json() == {"error": "The server shut down before the request was done."}
        assert each.ended()


def test_nothing_to_finish_is_an_end_at_once_whatever_connections_are_open() -> None:
    """Idle ones, one that has sent half a header, and one whose answer nobody reads."""
    with running(Instant, grace_period=3600.0) as each:
        assert each.client.get("/v2/health/live").status_code == 200
        with (
            socket.create_connection(("127.0.0.1", each.port)) as silent,
            socket.create_connection(("127.0.0.1", each.port)) as half,
        ):
            half.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: ")
            each.get("/v2/health/live")
            each.signal()
            assert each.ended()
            assert silent.recv(1) == half.recv(1) == b""


def test_the_end_lies_within_the_grace_period_whatever_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LAST_SECONDS", 4.0)
    with (
        running(Instant, grace_period=5.0, body_timeout=3600.0) as each,
        socket.create_connection(("127.0.0.1", each.port), timeout=WAIT) as stalled,
    ):
        stalled.sendall(
            f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n".encode()
        )
        assert stalled.recv(1000).startswith(b"HTTP/1.1 100")
        each.signal()
        each.thread.join(30.0)  # after 3.75 seconds, on a machine with nothing else to do
        assert not each.thread.is_alive()


@pytest.mark.parametrize("signals", [1, 2], ids=["at the end of the grace period", "at a second signal"])
def test_a_body_that_does_not_arrive_holds_nothing_up(signals: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.api.serving")
    grace_period = 1.0 if signals == 1 else 3600.0
    with running(Instant, grace_period=grace_period, body_timeout=3600.0) as each:
        with socket.create_connection(("127.0.0.1", each.port), timeout=WAIT) as stalled:
            raw = json.dumps(BODY).encode()
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(raw)}\r\n\r\n"
            stalled.sendall(head.encode())
            assert stalled.recv(1000).startswith(b"HTTP/1.1 100")  # the server is reading the body now
            stalled.sendall(raw[:10])
            for _ in range(signals):
                each.signal()
            assert each.ended()
            answer = b"".join(iter(partial(stalled.recv, 65536), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"connection: close" in answer.lower()
        assert answer.endswith(b'{"error": "The server shut down before the request was done."}')
    (line,) = [record for record in caplog.records if record.name == "app.api.serving"]
    assert line.fields["status"] == 503  # type: ignore[attr-defined]


def test_every_setting_of_connections_reaches_them() -> None:
    settings = Settings(timeout_keep_alive=7, event_loop="asyncio", body_timeout=3.0, grace_period=2.0)
    made: Any = _make_server(settings, None)[0]
    assert (made.config.timeout_keep_alive, made.config.loop) == (7, "asyncio")
    assert made.config.http.keywords == {"timeout": 3.0}
    assert (made._handshake_timeout, made._grace_period) == (3.0, 2.0)


def test_an_event_loop_that_is_not_installed_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidSettings, match="--event_loop is 'uvloop', which is not installed here"):
        _make_server(Settings(event_loop="uvloop"), None)
    _make_server(Settings(event_loop="auto"), None)


def test_what_others_say_about_workers_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As platforms set it for other servers, sometimes to no number."""
    monkeypatch.setenv("WEB_CONCURRENCY", "auto")
    assert _make_server(Settings(), None)[0].config.workers == 1
