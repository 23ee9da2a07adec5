"""Whatever a stranger makes of the OpenAPI document is served, and whatever it forbids is refused.

Schemathesis makes requests from the document, right ones and wrong ones, and holds the answers against it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.main import create_app
from app.settings import Settings
from tests.fakes import Strict

# With a version in the path come the same bodies, of which every corner is tried without one.
CONFIGURATION = """
[[operations]]
include-path-regex = "/versions/[^/]+/(infer|generate)"
phases.coverage.enabled = false
"""


@contextmanager
def serve(settings: Settings) -> Iterator[str]:
    """A ready server with a model that takes no time, in a thread; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(settings, load=Strict), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        # The listener takes the connection before the server is there to answer it.
        for _ in range(100):
            if httpx.get(f"{url}/v2/health/ready", timeout=30).status_code == 200:
                break
            time.sleep(0.1)
        yield url
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("api_key", [None, "secret"], ids=["without a key", "with a key"])
def test_schemathesis_finds_nothing(api_key: str | None, tmp_path: Path) -> None:
    # Small pictures, because they are encoded in no time either.
    settings = Settings(model_name="sdxl", max_side=64, api_key=api_key, enable_latency_logging=False)
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--no-color", "--max-examples", "25"]
    command += ["--seed", "1", "--generation-deterministic"]
    if api_key:
        command += ["--header", f"Authorization: Bearer {api_key}"]
        # Every corner of every schema has been tried without a key; here it is what comes with none, or a wrong one.
        command += ["--phases", "examples,stateful"]
    with serve(settings) as url:
        result = subprocess.run(
            [*command, f"{url}/openapi.json"],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No issues found" in result.stdout, result.stdout
