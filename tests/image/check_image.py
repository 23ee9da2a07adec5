"""The image builds from nothing but a Debian and wheels, and serves as it promises: ``make image-test``.

Not part of `make test`: it takes minutes, and root with buildah and debootstrap. The server runs in a network namespace
without any network, under a user id that nobody knows, on a root file system that cannot be written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BASE = "localhost/sdxl-runtime-test-base:bookworm"
IMAGE = "localhost/sdxl-runtime-test:latest"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CERTIFICATES = Path("/etc/ssl/certs")
USER_ID = 123456
READY_SECONDS = 300
URL = "http://127.0.0.1:8080"

MISSING = [tool for tool in ("buildah", "debootstrap", "unshare", "nsenter") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.timeout(3600),  # Debian and all wheels may have to come over a slow line
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and namespaces need root"),
]


def run(*command: str, **options: Any) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


# --- Building --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Debian with Python, as an image; made once and kept, as a registry's would be."""
    if subprocess.run(["buildah", "inspect", BASE], capture_output=True, check=False).returncode == 0:
        return BASE
    folder = tmp_path_factory.mktemp("debian")
    packages = "ca-certificates,python3,python3-venv"
    run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder / "root"), MIRROR)
    run("tar", "--create", "--file", str(folder / "root.tar"), "--directory", str(folder / "root"), ".")
    shutil.rmtree(folder / "root")
    container = run("buildah", "from", "scratch").strip()
    try:
        run("buildah", "add", "--quiet", container, str(folder / "root.tar"), "/")
        run("buildah", "commit", "--quiet", container, BASE)
    finally:
        run("buildah", "rm", container)
    return BASE


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest) -> Iterator[str]:
    """The image, or one that is built already and whose name is in TEST_IMAGE."""
    if given := os.environ.get("TEST_IMAGE"):
        yield given
        return
    base_image = request.getfixturevalue("base_image")
    arguments = {"BASE_IMAGE": base_image, "DEVICE": "cpu", "VERSION": "0.1.0"}
    volumes = []
    # How pip reaches its index from this machine, it does from the build too.
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT"):
        if name in os.environ:
            arguments[name] = os.environ[name]
    for folder in (CERTIFICATES, Path(arguments.get("PIP_FIND_LINKS", "nowhere"))):
        if folder.is_dir():
            volumes += ["--volume", f"{folder}:{folder}:ro"]
    build_arguments = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    run(
        *("buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers=false", "--tag", IMAGE),
        *(*volumes, *build_arguments, str(ROOT)),
    )
    yield IMAGE
    run("buildah", "rmi", IMAGE)


@pytest.fixture(scope="session")
def config(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("buildah", "inspect", "--type", "image", image))["Docker"]["config"]
    return found


# --- Running ---------------------------------------------------------------------------------------------------

# The first namespaces hold the mounts and the network that the container gets. /run is only for buildah's own file.
ISOLATED = """
set -e
ip link set lo up
root=$(buildah mount "$1")
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -o remount,ro,bind "$root"
shift
exec "$@"
"""


@contextmanager
def container(image: str) -> Iterator[str]:
    name = run("buildah", "from", image).strip()
    try:
        # Makes the places that buildah mounts to, such as /etc/hosts, while there is somebody who can.
        run("buildah", "run", "--isolation", "chroot", name, "--", "true")
        yield name
    finally:
        run("buildah", "umount", name)
        run("buildah", "rm", name)


def command(name: str, *inside: str) -> list[str]:
    """Runs something in a container: no network, a user id that is nobody's, nothing to write to but /tmp."""
    return [
        *("unshare", "--mount", "--net", "bash", "-c", ISOLATED, "isolated", name),
        *("buildah", "run", "--isolation", "chroot", "--user", f"{USER_ID}:0"),
        # One thread, lest a busy machine's cores spend their time on waiting for each other.
        *("--mount", "type=tmpfs,destination=/tmp", "--env", "OMP_NUM_THREADS=1", name, "--", *inside),
    ]


class Server:
    """The server in a container, seen from outside.

    Attributes:
        process: what runs the container.
        pid: of the server itself.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.process = process
        self._log_path = log_path
        self.pid = self._wait_for(self._find, "no process of the server's")

    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def beside(self, *command: str) -> list[str]:
        """A command of this machine in the server's network, where loopback is all there is."""
        return ["nsenter", "--target", str(self.pid), "--net", *command]

    def inside(self, environment: list[str], *command: str) -> list[str]:
        """A command of the image's, beside the server and as the same user."""
        namespaces = ("--net", "--mount", "--root", "--wd", "--setgid", "0", "--setuid", str(USER_ID))
        return ["nsenter", "--target", str(self.pid), *namespaces, "env", "-i", *environment, *command]

    def paint(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "clients.paint", *arguments, "--url", URL, "--model", "sdxl"]
        return subprocess.Popen(
            self.beside(*command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def get(self, path: str) -> str:
        return run(*self.beside("curl", "--silent", "--fail", f"{URL}{path}"))

    def wait_until_ready(self) -> None:
        probe = self.beside("curl", "--silent", "--fail", f"{URL}/v2/health/ready")
        self._wait_for(lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, "not ready")

    def wait_until_busy(self) -> None:
        self._wait_for(lambda: 'sdxl_running_images{model_name="sdxl"} 1.0' in self.get("/metrics"), "nothing to do")

    def _find(self) -> int | None:
        """The last of our user's processes in the line that descends from the container's."""
        parents = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                text = status.read_text(encoding="utf-8")
            except OSError:
                continue  # it ended meanwhile
            numbers = {key: int(value) for key, value in re.findall(r"^(PPid|Uid):\s+(\d+)", text, re.MULTILINE)}
            if numbers["Uid"] == USER_ID and b"sdxl-runtime" in status.with_name("cmdline").read_bytes():
                parents[int(status.parent.name)] = numbers["PPid"]
        # buildah's own process comes before the server's.
        last = set(parents) - set(parents.values())
        return last.pop() if len(last) == 1 and "listening on" in self.log() else None

    def _wait_for(self, condition: Any, otherwise: str) -> Any:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if found := condition():
                return found
            assert self.process.poll() is None, self.log()
            time.sleep(0.2)
        raise AssertionError(f"{otherwise}\n{self.log()}")


@pytest.fixture(scope="session")
def server(image: str, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log_path = tmp_path_factory.mktemp("image") / "server.log"
    flags = ["--model_id", "demo", "--model_name", "sdxl", "--device", "cpu"]
    with container(image) as name, log_path.open("wb") as log:
        process = subprocess.Popen(command(name, *config["Entrypoint"], *flags), stdout=log, stderr=log)
        try:
            found = Server(process, log_path)
            found.wait_until_ready()
            yield found
        finally:
            if process.poll() is None:
                os.kill(found.pid, 9)
                process.wait(60)


# --- What it is ------------------------------------------------------------------------------------------------


def test_the_image_says_what_it_is_and_how_it_runs(config: dict[str, Any]) -> None:
    labels = config["Labels"]
    for name in ("title", "description", "licenses", "version", "revision", "created"):
        assert labels[f"org.opencontainers.image.{name}"]
    assert config["Entrypoint"] == ["sdxl-runtime"], "a shell in between would keep signals from the server"
    assert not config.get("Cmd")
    assert config["User"] == "1001:0", "a number, so that Kubernetes sees that it is not root"
    assert config["Healthcheck"]["Test"] == ["CMD", "sdxl-runtime", "health"]
    assert "8080/tcp" in config["ExposedPorts"]
    environment = dict(each.split("=", 1) for each in config["Env"])
    assert environment["HF_HUB_OFFLINE"] == "1"
    for name, value in environment.items():
        if name.endswith(("_HOME", "_DIR", "_PATH")) or name == "HOME":
            assert value == "/tmp" or value.startswith("/tmp/"), f"{name} is no place to write to"


def test_the_image_holds_what_is_locked_and_nothing_else(server: Server, config: dict[str, Any]) -> None:
    listing = "import importlib.metadata as m; print(*[f'{d.name}=={d.version}' for d in m.distributions()])"
    installed = run(*server.inside(config["Env"], "python", "-c", listing)).split()
    names = ("requirements.txt", "requirements-cpu.txt", "requirements-data.txt")
    text = "".join((ROOT / "deploy" / "image" / each).read_text(encoding="utf-8") for each in names)
    locked = re.findall(r"^([^\s#]+==\S+)", text, re.MULTILINE)
    assert {canonical(each) for each in installed} == {canonical(each) for each in locked} | {"sdxl-runtime==0.1.0"}


def canonical(requirement: str) -> str:
    name, _, version = requirement.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def test_bytecode_is_used_whatever_its_time(server: Server, config: dict[str, Any]) -> None:
    """Otherwise every start would compile anew, where nothing can be kept: a minute or more."""
    # The first bytes: a magic number, and flags that say 1 for bytecode that is checked by nothing.
    script = """
import importlib.util, pathlib, sys
import app.main, app.engine.assembling, app.engine.converting, app.engine.compiled, app.engine.flux, app.engine.sdxl
files = [file for root in ("torch", "diffusers", "app")
         for file in pathlib.Path(importlib.util.find_spec(root).origin).parent.rglob("*.pyc")]
# And all that a server imports, whoever made it.
specs = [getattr(module, "__spec__", None) for module in tuple(sys.modules.values())]
files += [pathlib.Path(spec.cached) for spec in specs if spec and (spec.cached or "").startswith(sys.prefix)]
print(len(files) > 1000, *[file for file in files if not file.exists() or file.read_bytes()[4] != 1])
"""
    assert run(*server.inside(config["Env"], "python", "-c", script)).split() == ["True"]


def test_nothing_outside_tmp_can_be_written(server: Server, config: dict[str, Any]) -> None:
    places = "/ /etc/sdxl-runtime /opt/sdxl-runtime /var/tmp"
    script = f"id -u; id -g; for place in {places}; do touch $place/x && echo $place; done; touch /tmp/x"
    assert run(*server.inside(config["Env"], "sh", "-c", script)).split() == [str(USER_ID), "0"]


def test_there_is_no_network_but_loopback(server: Server, config: dict[str, Any]) -> None:
    script = "import socket; print(*[name for _, name in socket.if_nameindex()])"
    assert run(*server.inside(config["Env"], "python", "-c", script)).split() == ["lo"]


def test_a_wrong_flag_ends_with_a_sentence(server: Server, config: dict[str, Any]) -> None:
    wrong = server.inside(config["Env"], *config["Entrypoint"], "--http_prt=1")
    result = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "'--http_prt' is not a flag (did you mean '--http_port'?)" in result.stderr


# --- What it does, in this order -------------------------------------------------------------------------------


def test_it_paints(server: Server, tmp_path: Path) -> None:
    painter = server.paint(
        "a large red circle on a white background", "--seed", "7", "--steps", "20", "--out", str(tmp_path)
    )
    output, _ = painter.communicate(timeout=READY_SECONDS)
    assert painter.returncode == 0, output
    (picture,) = tmp_path.glob("*.png")
    with Image.open(picture) as opened:
        red, green, blue = opened.convert("RGB").getpixel((opened.width // 2, opened.height // 2))  # type: ignore[misc]
    assert red > 180 and green < 90 and blue < 90


def test_its_health_check_passes(server: Server, config: dict[str, Any]) -> None:
    run(*server.inside(config["Env"], *config["Healthcheck"]["Test"][1:]))


def test_its_health_check_fails_where_nothing_listens(server: Server, config: dict[str, Any]) -> None:
    environment = [*config["Env"], "HTTP_PORT=8099"]
    result = subprocess.run(
        server.inside(environment, *config["Healthcheck"]["Test"][1:]), capture_output=True, check=False
    )
    assert result.returncode == 1


def test_sigterm_lets_the_picture_finish_and_ends_with_0(server: Server, tmp_path: Path) -> None:
    painter = server.paint("a small blue star on a yellow background", "--steps", "100", "--out", str(tmp_path))
    server.wait_until_busy()
    os.kill(server.pid, 15)
    output, _ = painter.communicate(timeout=READY_SECONDS)
    assert painter.returncode == 0, output + server.log()
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert server.process.wait(60) == 0, server.log()
