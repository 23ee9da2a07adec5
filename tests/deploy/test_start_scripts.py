"""The start scripts say what they mean, to podman and to the server itself."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from app.settings_sources import load_settings
from tests.deploy.manifests import DEPLOY, ROOT
from tests.e2e.conftest import LISTENING, START_SECONDS, clean_environment

SCRIPTS = sorted(DEPLOY.glob("start-*.sh"))
IMAGE = "sdxl-runtime:test"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs in place of podman and the server, which say how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("podman", "sdxl-runtime"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def started(
    script: Path, programs: Path, *flags: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a script does in a folder, by default the one that has the folder of programs."""
    return subprocess.run(
        [str(script), *flags],
        cwd=cwd or programs.parent,
        env={"PATH": f"{programs}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def start(script: Path, programs: Path, *flags: str, **environment: str) -> list[str]:
    """The command that a script comes to, where a folder models is beside it."""
    (programs.parent / "models").mkdir(exist_ok=True)
    result = started(script, programs, *flags, cwd=None, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def settings_of(flags: list[str]) -> Settings:
    settings = load_settings(flags, {}, Path("/nonexistent"))
    assert settings.ignored() == []
    return settings


def test_there_are_scripts() -> None:
    assert [script.name for script in SCRIPTS] == ["start-base.sh", "start-flux.sh", "start-refiner.sh"]
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


@pytest.mark.parametrize("script", [*SCRIPTS, DEPLOY / "start.sh", ROOT / "clients" / "curl.sh"], ids=lambda s: s.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    # The wheel puts the program beside Python's.
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    assert shellcheck is not None
    result = subprocess.run(
        [shellcheck, "--external-sources", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_server_takes_its_flags(script: Path, programs: Path) -> None:
    program, *flags = start(script, programs, "--max_queue", "16", PORT="9000")
    assert program == "sdxl-runtime"
    settings = settings_of(flags)
    assert (settings.http_port, settings.max_queue) == (9000, 16)


def started_without_a_path(folder: Path) -> subprocess.CompletedProcess[str]:
    """A script in a copy of the checkout, where nothing is on the PATH but what the script itself needs.

    Called by a link, as from a folder of one's own programs.
    """
    (folder / "path").mkdir()
    for name in ("dirname", "readlink"):
        program = shutil.which(name)
        assert program is not None
        (folder / "path" / name).symlink_to(program)
    shutil.copytree(DEPLOY, folder / "checkout/deploy")
    script = folder / "start sdxl"
    script.symlink_to("checkout/deploy/start-base.sh")
    environment = {"PATH": str(folder / "path")}
    return subprocess.run([str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_checkouts_own_server_serves_where_none_is_on_the_path(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "checkout/.venv").mkdir(parents=True)
    programs.rename(tmp_path / "checkout/.venv/bin")
    result = started_without_a_path(tmp_path)
    assert result.returncode == 0, result.stderr
    program, *flags = result.stdout.splitlines()
    assert program == "sdxl-runtime"
    assert settings_of(flags).http_port == 8080


def test_the_port_that_the_env_file_names_is_listened_to(programs: Path) -> None:
    env_file = programs.parent / ".env"
    env_file.write_text("HTTP_PORT=9001\n", encoding="utf-8")
    _, *flags = start(DEPLOY / "start-base.sh", programs)
    assert load_settings(flags, {}, env_file).http_port == 9001


def test_without_any_server_a_sentence_says_so(tmp_path: Path) -> None:
    result = started_without_a_path(tmp_path)
    assert result.returncode == 127
    assert result.stderr == "There is no sdxl-runtime on the PATH or in .venv: run make install, or name an IMAGE.\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_with_an_image_podman_gets_the_same_flags(script: Path, programs: Path) -> None:
    models = str(programs.parent / "models")
    direct = start(script, programs)[1:]
    program, *arguments = start(script, programs, IMAGE=IMAGE)
    assert program == "podman"
    options, flags = arguments[: arguments.index(IMAGE)], arguments[arguments.index(IMAGE) + 1 :]
    assert flags == [each.replace(models, "/mnt/models") for each in direct]
    settings_of(flags)
    assert options[:3] == ["run", "--rm", "--read-only"]
    assert f"{models}:/mnt/models:ro,Z" in options
    assert "nvidia.com/gpu=all" in options
    assert ("HF_HUB_OFFLINE=0" in options) == (script.name == "start-flux.sh")


def test_what_is_not_there_is_not_mounted(programs: Path) -> None:
    without = started(DEPLOY / "start-flux.sh", programs, IMAGE=IMAGE, GPU="none")
    assert (without.returncode, without.stderr) == (0, "")
    assert not any(each in without.stdout for each in ("gpu", ":/mnt/models", ".env"))
    (programs.parent / ".env").write_text("MAX_STEPS=10\n", encoding="utf-8")
    with_it = start(DEPLOY / "start-base.sh", programs, IMAGE=IMAGE)
    assert f"{programs.parent}/.env:/etc/sdxl-runtime/.env:ro,Z" in with_it


def test_a_folder_is_mounted_as_one_wherever_it_is_named_from(programs: Path) -> None:
    """podman takes a path that is not absolute for the name of a volume, and makes an empty one."""
    (programs.parent / "my models").mkdir()
    arguments = start(DEPLOY / "start-base.sh", programs, IMAGE=IMAGE, MODELS="my models")
    assert f"{programs.parent}/my models:/mnt/models:ro,Z" in arguments


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_folder_that_is_not_there_is_named_at_once(script: Path, programs: Path) -> None:
    """The server in the container would wait a minute for it, and then speak of /mnt/models."""
    result = started(script, programs, IMAGE=IMAGE, MODELS="modles")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"MODELS names a folder that is not there: {programs.parent}/modles\n"


def test_without_the_usual_folder_who_serves_something_else_from_an_image_is_served(programs: Path) -> None:
    flags = ("--single_file_model", "none", "--model_id", "demo")
    result = started(DEPLOY / "start-base.sh", programs, *flags, IMAGE=IMAGE)
    assert result.returncode == 0 and result.stdout.splitlines()[-4:] == list(flags)
    missing = f"{programs.parent}/models"
    assert result.stderr == f"There is no {missing} to mount as /mnt/models; name another folder as MODELS.\n"


def test_a_path_with_a_colon_is_refused_only_where_podman_would_part_it(programs: Path) -> None:
    folder = programs.parent / "16:9"
    (folder / "models").mkdir(parents=True)
    (folder / ".env").touch()
    script = DEPLOY / "start-base.sh"
    models = started(script, programs, IMAGE=IMAGE, MODELS="16:9/models")
    env_file = started(script, programs, cwd=folder, IMAGE=IMAGE)
    for result, path in ((models, folder / "models"), (env_file, folder / ".env")):
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"podman cannot mount a path with a colon in it: {path}\n"
    _, *flags = start(script, programs, MODELS="16:9/models")
    assert settings_of(flags).single_file_model == folder / "models/sd_xl_base_1.0.safetensors"


@pytest.mark.parametrize(("mode", "said"), [(0o600, True), (0o640, False), (0o644, False)], ids=["600", "640", "644"])
def test_an_env_file_that_the_container_cannot_read_is_told_of(programs: Path, mode: int, said: bool) -> None:
    (programs.parent / "mine").touch(mode)
    (programs.parent / "mine").chmod(mode)
    (programs.parent / ".env").symlink_to("mine")
    script = DEPLOY / "start-base.sh"
    (programs.parent / "models").mkdir()
    result = started(script, programs, IMAGE=IMAGE)
    assert result.returncode == 0 and "/.env:/etc/sdxl-runtime/.env" in result.stdout
    sentence = "The container's user may not read .env; chmod g+r .env lets it.\n"
    assert result.stderr == (sentence if said else "")
    assert started(script, programs).stderr == "", "the server of this machine runs as its caller"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_link_to_a_script_is_as_good(script: Path, programs: Path) -> None:
    first, second = programs / "one", programs / "another"
    first.symlink_to(os.path.relpath(script, programs))
    second.symlink_to(first.name)
    for environment in ({}, {"IMAGE": IMAGE}):
        assert start(second, programs, **environment) == start(script, programs, **environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_container_listens_where_podman_publishes(script: Path, programs: Path) -> None:
    """As an environment variable, which wins over .env and is what the HEALTHCHECK reads."""
    env_file = programs.parent / ".env"
    env_file.write_text("HTTP_PORT=9001\n", encoding="utf-8")
    _, *arguments = start(script, programs, IMAGE=IMAGE, PORT="9000")
    options, flags = arguments[: arguments.index(IMAGE)], arguments[arguments.index(IMAGE) + 1 :]
    values = [value for option, value in itertools.pairwise(options) if option == "--env" and "=" in value]
    environment = dict(value.split("=", 1) for value in values)
    port = load_settings(flags, environment, env_file).http_port
    assert options[options.index("--publish") + 1] == f"9000:{port}"
    assert environment["HTTP_PORT"] == str(port)


def test_they_serve_what_the_replaced_runtimes_scripts_served(programs: Path) -> None:
    base, flux, refiner = (settings_of(start(script, programs)[1:]) for script in SCRIPTS)
    assert base.single_file_model is not None and not base.use_refiner
    assert base.device == "enable_model_cpu_offload"
    assert refiner.use_refiner and refiner.refiner_single_file_model is not None
    assert refiner.device == "enable_sequential_cpu_offload"
    assert (flux.model_type, flux.device) == ("flux", "enable_model_cpu_offload")


def test_the_example_of_an_env_file_is_right(tmp_path: Path) -> None:
    example = DEPLOY / "env.example"
    names = {line.lstrip("#").split("=")[0].lower() for line in example.read_text(encoding="utf-8").splitlines()}
    keys = {name for name in names if name.isidentifier()}
    assert keys <= set(Settings.model_fields)
    settings = load_settings([], {}, example)
    assert (settings.max_queue, settings.log_format) == (64, "json")


def test_a_script_starts_a_server_that_ends_when_told(tmp_path: Path) -> None:
    """Serving the demo, and under the script's own process id, so that signals reach it."""
    (tmp_path / "sdxl-runtime").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m app "$@"\n', encoding="utf-8")
    (tmp_path / "sdxl-runtime").chmod(0o755)
    flags = ("--single_file_model", "none", "--model_id", "demo", "--device", "cpu")
    environment = clean_environment(PATH=f"{tmp_path}:{os.environ['PATH']}", PORT="0")
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(DEPLOY / "start-base.sh"), *flags], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := LISTENING.search(log_path.read_text(encoding="utf-8"))):
            assert process.poll() is None and time.monotonic() < deadline, log_path.read_text(encoding="utf-8")
            time.sleep(0.1)
        assert httpx.get(f"http://127.0.0.1:{found[1]}/v2/health/live", timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("env_file", "given"),
    [
        ("", {"MODEL_ID": "demo", "MODEL_NAME": "sdxl", "HTTP_PORT": "8080"}),
        (
            "# MODEL_ID=x\n#MODEL_NAME=x\nMY_HTTP_PORT=1\n",
            {"MODEL_ID": "demo", "MODEL_NAME": "sdxl", "HTTP_PORT": "8080"},
        ),
        ("MODEL_ID=/of/mine\n export HTTP_PORT = 9000\n", {"MODEL_NAME": "sdxl"}),
        ("\ufeffMODEL_ID=/of/mine\r\nHTTP_PORT=9000\r\n", {"MODEL_NAME": "sdxl"}),
    ],
    ids=["none", "others", "as people write it", "as Windows writes it"],
)
def test_make_serve_gives_the_server_only_what_the_env_file_does_not_name(
    tmp_path: Path, env_file: str, given: dict[str, str]
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program = tmp_path / ".venv" / "bin" / "sdxl-runtime"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nenv\n", encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / ".env").write_text(env_file, encoding="utf-8", newline="")
    environment = {"PATH": os.environ["PATH"]}
    said = subprocess.run(
        ["make", "serve"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    names = ("MODEL_ID", "MODEL_NAME", "HTTP_PORT")
    assert dict(line.split("=", 1) for line in said.splitlines() if line.startswith(names)) == given
