"""Life on a platform: signals, mounts that come late, users that nobody knows, and last words; with real processes."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.engine.weights import DEMO_WEIGHTS
from tests.e2e.conftest import REPOSITORY, Server, clean_environment, health
from tests.waiting import until

PREDICT = "/v1/models/sdxl:predict"
INFER = "/v2/models/sdxl/infer"
TIMEOUT = 300.0
LONG: dict[str, Any] = {"prompt": "a red circle", "width": 128, "height": 128, "num_inference_steps": 150}


@contextmanager
def process(folder: Path, *arguments: str, env: dict[str, str] | None = None, **popen: Any) -> Iterator[Server]:
    """A server that has just begun to listen; what becomes of it is the test's business."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "app", "--model_name", "sdxl", "--http_port", "0", *arguments]
    with log.open("wb") as file:
        started = subprocess.Popen(
            command,
            **{"cwd": folder, "env": clean_environment(**(env or {})), "stdout": file, "stderr": file, **popen},
        )
    try:
        yield Server(started, log)
    finally:
        started.kill()
        started.wait()


def status(server: Server, path: str = "/v2/health/ready") -> int:
    return httpx.get(f"{server.url}{path}", timeout=TIMEOUT).status_code


# --- Signals ---------------------------------------------------------------------------------------------------


class TestSignals:
    @pytest.fixture
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(4) as pool:
            yield pool

    def paint(self, pool: ThreadPoolExecutor, server: Server, images: int) -> Future[httpx.Response]:
        """A request that the device has begun with."""
        content = {"instances": [{**LONG, "num_images_per_prompt": images}]}
        asked = pool.submit(httpx.post, f"{server.url}{PREDICT}", json=content, timeout=TIMEOUT)
        until(lambda: server.metric("sdxl_running_images") > 0)
        return asked

    def test_a_running_request_gets_its_picture_and_new_ones_are_refused(
        self, tmp_path: Path, pool: ThreadPoolExecutor
    ) -> None:
        with process(tmp_path, "--model_id", "demo", "--grace_period", str(TIMEOUT)) as server:
            server.wait_until_ready()
            asked = self.paint(pool, server, images=2)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: status(server) == 503)
            assert status(server, "/v2/health/live") == 200
            for path, content in ((PREDICT, {"instances": [{"prompt": "a"}]}), (INFER, {})):
                refused = httpx.post(f"{server.url}{path}", json=content, timeout=TIMEOUT)
                assert refused.status_code == 503 and refused.headers["connection"] == "close"
                assert refused.json() == {"error": "The server is shutting down and takes no more requests."}
            assert not asked.done()
            answer = asked.result(TIMEOUT)
            assert answer.status_code == 200
            for prediction in answer.json()["predictions"]:
                assert base64.b64decode(prediction["image"]["b64"]).startswith(b"\x89PNG")
            assert server.process.wait(TIMEOUT) == 0
            assert "Traceback" not in server.log()

    def test_what_takes_too_long_is_told_so_and_the_exit_code_is_zero(
        self, tmp_path: Path, pool: ThreadPoolExecutor
    ) -> None:
        with process(tmp_path, "--model_id", "demo", "--grace_period", "2") as server:
            server.wait_until_ready()
            asked = self.paint(pool, server, images=16)
            server.process.send_signal(signal.SIGTERM)
            assert asked.result(TIMEOUT).status_code == 503
            assert "shut down before the request was done" in asked.result(TIMEOUT).json()["error"]
            assert server.process.wait(TIMEOUT) == 0
            assert "Traceback" not in server.log()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
    def test_a_second_signal_ends_at_once(
        self, tmp_path: Path, pool: ThreadPoolExecutor, number: signal.Signals
    ) -> None:
        with process(tmp_path, "--model_id", "demo", "--grace_period", "3600", "--request_timeout", "3600") as server:
            server.wait_until_ready()
            asked = self.paint(pool, server, images=16)
            server.process.send_signal(number)
            until(lambda: status(server) == 503)
            assert server.metric("sdxl_running_images") > 0
            server.process.send_signal(number)
            assert asked.result(TIMEOUT).status_code == 503
            assert server.process.wait(TIMEOUT) == 0
            assert "Traceback" not in server.log()


# --- Mounts ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_mounted_late_is_waited_for_while_the_server_is_live(tmp_path: Path) -> None:
    """As a model image is: a link that appears first, and then what it points to."""
    models = tmp_path / "mnt" / "models"
    models.parent.mkdir()
    with process(tmp_path, "--model_id", str(models), "--mount_timeout", str(TIMEOUT)) as server:
        until(lambda: f"waiting up to {TIMEOUT:g} seconds for the mount: {models} does not exist" in server.log())
        assert status(server, "/v2/health/live") == 200
        ready = httpx.get(f"{server.url}/v2/health/ready")
        assert ready.status_code == 503
        assert f"sdxl is loading: waiting for the mount, {models} does not exist." in ready.json()["error"]
        models.symlink_to(tmp_path / "proc" / "root" / "models")
        assert status(server) == 503
        shutil.copytree(DEMO_WEIGHTS / "sdxl", tmp_path / "copy")
        (tmp_path / "proc" / "root").mkdir(parents=True)
        (tmp_path / "copy").rename(tmp_path / "proc" / "root" / "models")
        server.wait_until_ready()
        small = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1}
        assert httpx.post(f"{server.url}{PREDICT}", json={"instances": [small]}, timeout=TIMEOUT).status_code == 200


def test_a_signal_ends_the_wait_for_a_mount(tmp_path: Path) -> None:
    with process(tmp_path, "--model_id", str(tmp_path / "models"), "--mount_timeout", "3600") as server:
        until(lambda: "waiting up to 3600 seconds" in server.log())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(TIMEOUT) == 0


# --- Last words ------------------------------------------------------------------------------------------------


def end(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and last line of a server that cannot run."""
    command = [sys.executable, "-m", "app", "--http_port", "0", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()[-1].removeprefix("sdxl-runtime: ")


def test_why_a_model_cannot_be_loaded_stands_in_the_termination_log(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    arguments = ["--termination_log", str(log), "--model_id", str(tmp_path / "models")]
    code, sentence = end(tmp_path, *arguments)
    assert code == 1 and "does not exist" in sentence
    assert log.read_text() == sentence
    code, sentence = end(tmp_path, *arguments, "--mount_timeout", "0.5")
    assert code == 1 and "after 0.5 seconds of waiting" in sentence
    assert log.read_text() == sentence


def test_why_settings_are_wrong_stands_there_too(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    code, sentence = end(tmp_path, "--max_steps", "many", env={"TERMINATION_LOG": str(log)})
    assert code == 2 and "--max_steps" in sentence
    assert log.read_text() == sentence
    code, sentence = end(tmp_path, "--max_step", "4", "--termination-log", str(log))
    assert code == 2 and "'--max_step' is not a flag" in sentence
    assert log.read_text() == sentence
    (tmp_path / ".env").write_text(f"TERMINATION_LOG={log}\nMAX_STEPS=few\n")
    code, sentence = end(tmp_path)
    assert code == 2 and "MAX_STEPS in .env" in sentence
    assert log.read_text() == sentence


def test_without_the_file_there_are_no_last_words_but_on_standard_error(tmp_path: Path) -> None:
    code, sentence = end(tmp_path, "--termination_log", str(tmp_path / "absent"), "--model_id", "/nowhere")
    assert code == 1 and "/nowhere does not exist" in sentence
    assert not (tmp_path / "absent").exists()


# --- Places where nothing can be written -----------------------------------------------------------------------


def test_a_user_that_nobody_knows_without_a_home_serves_a_model_that_can_only_be_read(tmp_path: Path) -> None:
    """The user may read everything and write nothing but the temporary folder, as in a locked down container."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("only root can start a process as another user, with setpriv")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o777)
    shutil.copytree(DEMO_WEIGHTS / "sdxl", tmp_path / "models")
    log = tmp_path / "server.log"
    only = "-all,+dac_read_search"
    command = [setpriv, "--reuid=123456", "--regid=0", "--clear-groups"]
    command += [f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}", "--no-new-privs"]
    command += [sys.executable, "-m", "app", "--model_name", "sdxl", "--http_port", "0"]
    command += ["--model_id", str(tmp_path / "models")]
    environment = clean_environment(HOME="/", TMPDIR=str(temporary))
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        environment.pop(name, None)
    with log.open("wb") as file:
        started = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file)
    try:
        server = Server(started, log)
        server.wait_until_ready()
        assert f"Uid:\t{123456}" in Path(f"/proc/{server.pid}/status").read_text()
        small = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1}
        assert httpx.post(f"{server.url}{PREDICT}", json={"instances": [small]}, timeout=TIMEOUT).status_code == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log()
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize("stream", ["full", "closed"])
def test_a_log_that_cannot_be_written_stops_nobody(stream: str, tmp_path: Path) -> None:
    """A disk without room, and no standard error at all."""
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    with httpx.Client(timeout=TIMEOUT) as client:
        redirect = ">/dev/full 2>/dev/full" if stream == "full" else ">&- 2>&- <&-"
        port = free_port()
        command = f"exec {sys.executable} -m app --model_id demo --model_name sdxl --http_port {port} {redirect}"
        started = subprocess.Popen(["sh", "-c", command], cwd=tmp_path, env=clean_environment())
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: started.poll() is not None or is_ready(client, url))
            small = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1}
            assert client.post(f"{url}{PREDICT}", json={"instances": [small]}).status_code == 200
            started.terminate()
            assert started.wait(TIMEOUT) == 0
        finally:
            started.kill()
            started.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


# --- sdxl-runtime health ---------------------------------------------------------------------------------------


def test_health_says_yes_of_a_server_that_is_well(server: Server, tmp_path: Path) -> None:
    port = server.host.split(":")[1]
    well = f"The server at {server.url} is"
    assert health(tmp_path, HTTP_PORT=port) == (0, f"{well} ready.\n")
    assert health(tmp_path, "--ready", "--http_port", port) == (0, f"{well} ready.\n")
    assert health(tmp_path, "--live", "--url", server.url) == (0, f"{well} live.\n")
    # Neither a key nor a proxy stands in the way.
    assert health(tmp_path, HTTP_PORT=port, HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1")[0] == 0
    (tmp_path / ".env").write_text(f"HTTP_PORT={port}\n")
    assert health(tmp_path) == (0, f"{well} ready.\n")


def test_health_says_no_while_loading_and_when_nobody_is_there(tmp_path: Path) -> None:
    with process(tmp_path, "--model_id", str(tmp_path / "models"), "--mount_timeout", "3600") as server:
        assert health(tmp_path, "--live", "--url", server.url)[0] == 0
        code, said = health(tmp_path, "--url", server.url)
        assert code == 1 and f"{server.url} is not ready: Not every model is ready: sdxl is loading" in said
    assert health(tmp_path, "--url", server.url) == (
        1,
        f"The server at {server.url} does not answer (Connection refused).\n",
    )


def test_health_imports_nothing_that_takes_time(tmp_path: Path) -> None:
    code = "import sys; sys.argv[1:] = ['health']; import app.__main__ as a; a.main(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True
    )
    assert not {"torch", "pydantic", "fastapi", "uvicorn", "numpy", "httpx", "app.settings"} & set(done.stdout.split())


@pytest.mark.parametrize("command", [[], ["serve"]], ids=["unasked", "asked"])
def test_serve_is_what_is_done_unasked(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app", *command, "--http_port", "0", "--model_id", "/nowhere"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 1 and "/nowhere does not exist" in done.stderr
