"""What a process does whose device fails for good: nobody waits for ever, health tells, and a lost one ends it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Server, launch

BODY = {"prompt": "p"}
TIMEOUT = 60.0


@contextmanager
def serving(folder: Path, family: str, *flags: str) -> Iterator[Server]:
    """A server of a family from `tests.fakes`, in a process of its own."""
    code = f"import sys, app.main, tests.fakes; app.main._load_family = lambda *_: tests.fakes.{family}(); " + (
        "sys.exit(app.main.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--model_name", "sdxl", "--http_port", "0", "--warm_up=false", *flags]
    process, log_path = launch(command, folder)
    try:
        server = Server(process, log_path)
        server.wait_until_ready()
        yield server
    finally:
        process.kill()
        process.wait()


def paint(server: Server) -> httpx.Response:
    return httpx.post(f"{server.url}/v2/models/sdxl/generate", json=BODY, timeout=TIMEOUT)


def test_a_lost_device_is_an_answer_and_then_exit_code_3(tmp_path: Path) -> None:
    with serving(tmp_path, "LosesTheDevice") as server:
        answer = paint(server)
        assert answer.status_code == 500 and "restarted" in answer.json()["error"]
        assert server.process.wait(TIMEOUT) == 3
        assert "the device is lost" in server.log() and "must be restarted" in server.log()


@pytest.mark.parametrize(("family", "flags", "status"), [("Hangs", ("--step_timeout=0.05",), 500), ("Dies", (), 500)])
def test_a_device_that_hangs_or_dies_is_not_live_within_seconds(
    tmp_path: Path, family: str, flags: tuple[str, ...], status: int
) -> None:
    with serving(tmp_path, family, *flags) as server:
        assert paint(server).status_code == status
        live: Any = httpx.get(f"{server.url}/v2/health/live", timeout=TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while live.status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
            live = httpx.get(f"{server.url}/v2/health/live", timeout=TIMEOUT)
        assert live.status_code == 503 and live.json()["live"] is False
        assert httpx.get(f"{server.url}/v2/health/ready", timeout=TIMEOUT).status_code == 503
        assert paint(server).status_code == 503
        server.stop()
        assert ("hangs" if family == "Hangs" else "device thread ended") in server.log()
