"""The real server as a process of its own, for tests that talk to it over a socket.

`server` is one server of the demo model for the whole run; `start_server` starts further ones with other flags, which
costs seconds, so a test file asks for as few as it can.
"""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from app.settings import Settings

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 300
STOP_SECONDS = 120
LISTENING = re.compile(r"listening on https?://\S+:(\d+)")


class Server:
    """A running server.

    Attributes:
        url: where it listens, such as ``http://127.0.0.1:40123``.
        verify: for httpx: the certificate that an HTTPS server is trusted by.
        host: the same without the scheme, as some clients want it.
        pid: of its process.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, verify: ssl.SSLContext | bool = True) -> None:
        self.process = process
        self.pid = process.pid
        self._log_path = log_path
        self.verify = verify
        scheme, port = self._wait_for_port()
        self.host = f"127.0.0.1:{port}"
        self.url = f"{scheme}://{self.host}"

    def log(self) -> str:
        """All that it has said so far, on standard output and standard error."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that carry `labels`."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", timeout=60, verify=self.verify).text.splitlines():
            sample, _, value = line.rpartition(" ")
            found, _, rest = sample.partition("{")
            if found == name and all(f'{label}="{text}"' in rest for label, text in labels.items()):
                total += float(value)
        return total

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_running()
            try:
                if httpx.get(f"{self.url}/v2/health/ready", timeout=10, verify=self.verify).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"The server was not ready after {START_SECONDS} seconds:\n{self.log()}")

    def stop(self) -> int:
        """Ask it to end and wait for it; a second call does nothing.

        Returns:
            Its exit code.
        """
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"The server did not end within {STOP_SECONDS} seconds:\n{self.log()}") from None

    def _wait_for_port(self) -> tuple[str, int]:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = LISTENING.search(self.log())
            if found:
                return "https" if "https://" in found[0] else "http", int(found[1])
            self._check_running()
            time.sleep(0.05)
        raise AssertionError(f"The server did not listen after {START_SECONDS} seconds:\n{self.log()}")

    def _check_running(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise AssertionError(f"The server ended with exit code {code}:\n{self.log()}")


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment for a server: none of its settings from ours, and the package found wherever it runs."""
    settings = {name.upper() for name in Settings.model_fields}
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["PYTHONUNBUFFERED"] = "1"
    return {**environment, **extra}


def health(folder: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """What ``sdxl-runtime health`` ends with in that working directory, and all that it says."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "health", *arguments],
        cwd=folder,
        env=clean_environment(**env),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def launch(
    command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Path]:
    """A process in that working directory, and the file that gets what it says."""
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=clean_environment(**(env or {})), stdout=log, stderr=subprocess.STDOUT
        )
    return process, log_path


DEMO_FLAGS = ("--model_id", "demo", "--model_name", "sdxl")


@contextmanager
def running_server(
    folder: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    model: Sequence[str] = DEMO_FLAGS,
    verify: ssl.SSLContext | bool = True,
) -> Iterator[Server]:
    """A ready server of the demo model in that working directory; the last of two equal flags wins."""
    process, log_path = launch([sys.executable, "-m", "app", *model, "--http_port", "0", *flags], folder, env)
    try:
        server = Server(process, log_path, verify)
        server.wait_until_ready()
        yield server
        code = server.stop()
        assert code == 0, f"The server ended with exit code {code}:\n{server.log()}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of the demo model under the name ``sdxl``, with every other setting at its default."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers with further flags; they end with the module that asked for them."""
    with ExitStack() as stack:

        def start(*flags: str, env: Mapping[str, str] | None = None) -> Server:
            return stack.enter_context(running_server(tmp_path_factory.mktemp("server"), *flags, env=env))

        yield start
