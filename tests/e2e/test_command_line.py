"""The command line: what starts, what is refused and in which words, and which of three sources of a setting wins.

Most cases only read settings; those that start the server ask for as little of it as shows the point.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app import compile_cache
from app.errors import InvalidSettings
from app.settings import Settings
from app.settings_sources import load_settings
from tests.e2e.conftest import Server, clean_environment

TIMEOUT = 300
KEY = "open-sesame-42"

KSERVE_FLAGS = {
    # flag, a value, whether it does something here
    "http_port": ("8080", True),
    "model_name": ("model", True),
    "enable_docs_url": ("False", True),
    "enable_latency_logging": ("True", True),
    "configure_logging": ("True", True),
    "event-loop": ("auto", True),
    "timeout-keep-alive": ("65", True),
    "grpc_port": ("8081", False),
    "enable_grpc": ("True", False),
    "grpc_max_send_message_length": ("8388608", False),
    "grpc_max_receive_message_length": ("8388608", False),
    "workers": ("1", False),
    "max_threads": ("4", False),
    "max_asyncio_workers": ("8", False),
    "predictor_host": ("example.com", False),
    "protocol": ("v1", False),
    "predictor_protocol": ("v1", False),
    "predictor_use_ssl": ("False", False),
    "ssl_certfile": ("none", True),
    "ssl_keyfile": ("none", True),
    "predictor_request_timeout_seconds": ("600", False),
    "predictor_request_retries": ("0", False),
    "enable_predictor_health_check": ("False", False),
}


def read(*arguments: str, env: dict[str, str] | None = None, env_file: Path = Path("/nonexistent/.env")) -> Settings:
    return load_settings(arguments, env or {}, env_file)


def complaint(*arguments: str, env: dict[str, str] | None = None, env_file: Path = Path("/nonexistent/.env")) -> str:
    with pytest.raises(InvalidSettings) as caught:
        read(*arguments, env=env, env_file=env_file)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def run(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=folder,
        env=clean_environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def refused(finished: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit code 2, nothing on standard output, and exactly one line on standard error."""
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("sdxl-runtime: ")
    for part in says:
        assert part in line


def failed(finished: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit code 1, no traceback, and one last line on standard error that says why."""
    assert finished.returncode == 1, finished.stderr
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("sdxl-runtime: ")]
    assert line == finished.stderr.splitlines()[-1]
    for part in says:
        assert part in line


# --- Help ------------------------------------------------------------------------------------------------------


def test_help_explains_every_setting_and_its_default(tmp_path: Path) -> None:
    finished = run(tmp_path, "--help")
    assert finished.returncode == 0
    assert finished.stderr == ""
    words = "".join(finished.stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name}" in finished.stdout
        assert field.description
        assert "".join(field.description.split()) in words
        default = "unset" if field.default in (None, ()) else str(field.default)
        assert f"(default:{''.join(default.split())})" in words


# --- Where a value comes from ----------------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_and_that_over_the_env_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("MAX_STEPS=10\nMAX_QUEUE=20\nMODEL_NAME=from-file\n")
    env = {"MAX_STEPS": "11", "MAX_QUEUE": "21"}
    settings = read("--max_steps", "12", env=env, env_file=env_file)
    assert (settings.max_steps, settings.max_queue, settings.model_name) == (12, 21, "from-file")
    assert settings.max_batch_size == Settings().max_batch_size


def test_a_flag_wins_although_it_names_the_default(tmp_path: Path) -> None:
    assert read("--http_port", "8080", env={"HTTP_PORT": "9000"}).http_port == 8080


def test_of_two_equal_flags_the_last_wins() -> None:
    assert read("--max_steps=5", "--max-steps", "6").max_steps == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max_body_size", "4096"],
        ["--max_body_size=4096"],
        ["--max-body-size", "4096"],
        ["--max-body-size=4096"],
    ],
    ids=" ".join,
)
def test_underscores_and_hyphens_spaces_and_equals_signs_mean_the_same(arguments: list[str]) -> None:
    assert read(*arguments).max_body_size == 4096


def test_every_setting_can_be_written_with_hyphens() -> None:
    for name, field in Settings.model_fields.items():
        if field.default not in (None, ()):
            assert getattr(read(f"--{name.replace('_', '-')}={field.default}"), name) == field.default


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "True", "TRUE", "1", "yes", "y", "on", "t")),
        *((text, False) for text in ("false", "False", "FALSE", "0", "no", "n", "off", "f")),
    ],
)
def test_truth_may_be_written_in_every_usual_way(text: str, value: bool) -> None:
    assert read(f"--warm_up={text}").warm_up is value
    assert read("--warm_up", text).warm_up is value
    assert read(env={"WARM_UP": text}).warm_up is value


def test_a_flag_of_truth_may_stand_alone() -> None:
    settings = read("--enable_docs_url", "--predictor_use_ssl", "--max_steps", "5", env={"ENABLE_DOCS_URL": "false"})
    assert settings.enable_docs_url is settings.predictor_use_ssl is True
    assert settings.max_steps == 5


def test_an_env_file_is_read_as_people_write_it(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(
        "# the demo\nexport MODEL_ID=demo\n"
        'MODEL_NAME="my model"  # quoted\n\n'
        "MAX_STEPS = 7\nAPI_KEY=a$HOME\nUNRELATED=1\n"
    )
    settings = read(env_file=env_file)
    assert (settings.model_id, settings.model_name, settings.max_steps) == ("demo", "my model", 7)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "a$HOME"


def test_what_may_be_unset_can_be_unset_again() -> None:
    for text in ("", "none", "None"):
        assert read(f"--api_key={text}", env={"API_KEY": KEY}).api_key is None
        assert read(env={"LOG_CONFIG_FILE": text}).log_config_file is None


def test_an_address_that_kubernetes_announces_under_the_name_of_a_setting_is_not_meant_for_us() -> None:
    assert read(env={"HTTP_PORT": "tcp://10.0.0.1:80", "MODEL_NAME": "sdxl"}).http_port == 8080


def test_variables_of_others_do_not_matter() -> None:
    assert read(env={"max_steps": "5", "SDXL_MAX_STEPS": "5", "PATH": "/bin", "MAX": "x"}) == Settings()


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max_step", "5"], ["'--max_step' is not a flag", "did you mean '--max_steps'?"]),
        (["--max-stebs=5"], ["'--max-stebs' is not a flag", "did you mean '--max_steps'?"]),
        (["--zzz"], ["'--zzz' is not a flag", "see --help"]),
        (["-p", "80"], ["'-p' is not a flag"]),
        (["serve"], ["'serve' is not a flag"]),
        (["--max_steps"], ["--max_steps", "expected one argument"]),
        (["--max_steps", "--max_queue", "5"], ["--max_steps", "expected one argument"]),
        (["--max_steps", "many"], ["--max_steps is 'many', but it must be a valid integer"]),
        (["--max_steps", "0"], ["--max_steps is '0', but it must be greater than or equal to 1"]),
        (["--max_steps", "-5"], ["--max_steps is '-5', but it must be greater than or equal to 1"]),
        (["--max_steps", "1.5"], ["--max_steps is '1.5', but it must be a valid integer"]),
        (["--max_steps="], ["--max_steps is '', but it must be a valid integer"]),
        (["--http_port", "65536"], ["--http_port is '65536', but it must be less than or equal to 65535"]),
        (["--body_timeout", "0"], ["--body_timeout is '0', but it must be greater than 0"]),
        (["--body_timeout", "soon"], ["--body_timeout is 'soon', but it must be a valid number"]),
        (["--body_timeout", "nan"], ["--body_timeout is 'nan', but it must be"]),
        (["--grace_period", "inf"], ["--grace_period is 'inf', but it must be"]),
        (["--warm_up="], ["--warm_up is '', but", "must be true or false"]),
        (["--dtype", "float8"], ["--dtype is 'float8', but must be one of auto, float32, float16, bfloat16"]),
        (["--model_type", "sd15"], ["--model_type is 'sd15', but must be one of auto, sdxl"]),
        (["--log_level", "INFO!"], ["--log_level is 'INFO!', but must be one of debug, info, warning, error"]),
        (["--warm_up", "maybe"], ["--warm_up is 'maybe', but it must be true or false (Run"]),
        (["--device", "gpu"], ["--device is 'gpu', but it must be one of those named here (", "cuda:N"]),
        (["--device", "cuda:x"], ["--device is 'cuda:x', but", "cuda:N"]),
        (["--model_name="], ["--model_name is '', but it must not be empty ("]),
        (["--model_name", "sd/xl"], ["--model_name is 'sd/xl', but it must not contain '/' or be '.' or '..', or no"]),
        (["--model_name", ".."], ["--model_name is '..', but it must not contain '/' or be '.' or '..', or no path"]),
        (["--warm_sizes", "512x512,big"], ["--warm_sizes is '512x512,big', but it must be WIDTHxHEIGHT"]),
        (
            ["--lora", "style.safetensors"],
            ["--lora is 'style.safetensors', but it must be NAME=PATH or NAME=PATH:SCALE"],
        ),
        (
            ["--lora", "v1.5=style.safetensors"],
            ["--lora is 'v1.5=style.safetensors', but it must be NAME=PATH", "a name has letters, digits, - and _"],
        ),
        (
            ["--warm_sizes", "1024x1024,64x4096"],
            ["--warm_sizes names 64x4096, which no request may ask for: one side may have at most 2048", "(max_side)."],
        ),
        (
            ["--warm_sizes", "64x64,128x64", "--max_pixels", "4096"],
            ["--warm_sizes names 128x64, which no request may ask for: a picture may have at most 4096 pixels ("],
        ),
        (["--max_images_per_request", "200"], ["max_images_per_request (200) must not be more than max_queue (128)"]),
        (["--max_queue", "4"], ["max_images_per_request (16) must not be more than max_queue (4)"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0].startswith("-") else None,
)
def test_a_wrong_flag_is_named_with_what_it_may_be(arguments: list[str], says: list[str]) -> None:
    sentence = complaint(*arguments)
    for part in says:
        assert part in sentence


def test_a_wrong_value_is_named_by_the_place_where_it_stands(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("MAX_STEPS=many\n")
    assert complaint(env={"MAX_STEPS": "many"}).startswith("MAX_STEPS in the environment is 'many', but it must be")
    assert complaint(env_file=env_file).startswith(f"MAX_STEPS in {env_file} is 'many', but it must be")
    assert complaint("--max-steps=many").startswith("--max_steps is 'many', but it must be")


def test_a_wrong_value_that_is_overruled_does_no_harm() -> None:
    assert read("--max_steps", "5", env={"MAX_STEPS": "many"}).max_steps == 5


def test_an_env_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_bytes(b"MAX_STEPS=\xff\xfe\n")
    assert f"{env_file} cannot be read" in complaint(env_file=env_file)


def test_a_long_wrong_value_is_not_shown_at_length() -> None:
    assert len(complaint("--max_steps", "x" * 10_000)) < 300


@pytest.mark.parametrize(
    ("arguments", "env", "env_file", "says"),
    [
        (["--max_step", "5"], {}, "", "'--max_step' is not a flag"),
        (["--max_steps", "many"], {}, "", "--max_steps is 'many'"),
        ([], {"MAX_STEPS": "many"}, "", "MAX_STEPS in the environment is 'many'"),
        ([], {}, "MAX_STEPS=many", "MAX_STEPS in .env is 'many'"),
    ],
    ids=["unknown-flag", "wrong-flag", "wrong-variable", "wrong-key-in-env-file"],
)
def test_a_wrong_setting_ends_the_start_with_one_line(
    tmp_path: Path, arguments: list[str], env: dict[str, str], env_file: str, says: str
) -> None:
    (tmp_path / ".env").write_text(env_file)
    refused(run(tmp_path, *arguments, env=env), says)


def test_a_port_in_use_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        finished = run(tmp_path, "--model_id", "demo", "--host", "127.0.0.1", "--http_port", port)
    refused(finished, f"Cannot listen on 127.0.0.1 port {port} (Address already in use", "choose another --http_port")


def test_a_host_that_is_not_ours_ends_the_start_with_one_line(tmp_path: Path) -> None:
    # An address for documentation, which no machine has.
    refused(run(tmp_path, "--model_id", "demo", "--host", "192.0.2.1"), "Cannot listen on 192.0.2.1 port 8080")
    unknown = run(tmp_path, "--model_id", "demo", "--host", "no.invalid")
    refused(unknown, "Cannot listen on no.invalid port 8080 (", "choose another --http_port or --host.")
    assert "Unknown error" not in unknown.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.json", "{"),
        ("log.json", "[]"),
        ("log.json", '{"version": 7}'),
        ("log.json", '{"version": 1, "root": {"handlers": ["missing"]}}'),
        ("log.yaml", "version: [1"),
        ("log.yaml", "version: 1\nhandlers: {h: {class: no.such.Class}}\nroot: {handlers: [h]}\n"),
        ("absent.json", None),
    ],
    ids=["no-json", "a-list", "an-unknown-version", "no-handler", "no-yaml", "no-class", "no-file"],
)
def test_a_wrong_logging_configuration_ends_the_start_with_one_line(
    tmp_path: Path, name: str, text: str | None
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(run(tmp_path, "--model_id", "demo", "--log_config_file", name, "--http_port", "0"), name)


# --- Models that are not there ---------------------------------------------------------------------------------


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch ends the process."""
    (tmp_path / "sabotage").mkdir()
    (tmp_path / "sabotage" / "torch.py").write_text("import os\nos._exit(99)\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "sabotage"), clean_environment()["PYTHONPATH"]])}


def serve(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "--http_port", "0", *arguments, env=env)


def test_a_missing_model_folder_is_told_before_torch_is_imported_and_with_a_way_out(
    tmp_path: Path, without_torch: dict[str, str]
) -> None:
    finished = serve(tmp_path, without_torch, "--model_id", "/nowhere/models")
    failed(finished, "The model folder /nowhere/models does not exist", "--model_id demo")


def test_a_model_folder_that_is_a_file_is_told_so(tmp_path: Path, without_torch: dict[str, str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    finished = serve(tmp_path, without_torch, "--model_id", "model.safetensors")
    failed(finished, "The model folder model.safetensors is not a folder", "--model_id demo")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (None, "does not exist; the model folder must be in diffusers' layout"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "names the pipeline None"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"_class_name": "SanaPipeline"}', "names the pipeline SanaPipeline; served are StableDiffusionXLPipeline"),
        (b'{"_class_name": ["StableDiffusionXLPipeline", 1]}', "model_index.json"),
        (b'{"_class_name": null}', "model_index.json"),
    ],
    ids=["none", "empty", "cut", "a-list", "no-class", "no-text", "another-pipeline", "a-class-list", "a-class-null"],
)
def test_a_broken_model_index_is_named(
    tmp_path: Path, without_torch: dict[str, str], index: bytes | None, says: str
) -> None:
    (tmp_path / "model").mkdir()
    if index is not None:
        (tmp_path / "model" / "model_index.json").write_bytes(index)
    failed(serve(tmp_path, without_torch, "--model_id", "model"), "model/model_index.json", says)


def test_a_folder_of_models_and_a_folder_of_files_are_told_what_to_name(
    tmp_path: Path, without_torch: dict[str, str]
) -> None:
    (tmp_path / "models" / "flux").mkdir(parents=True)
    (tmp_path / "models" / "sd_xl_base_1.0.safetensors").touch()
    finished = serve(tmp_path, without_torch, "--model_id", "models")
    failed(finished, "model_index.json does not exist", "sd_xl_base_1.0.safetensors, is named with --single_file_model")
    (tmp_path / "models" / "flux" / "model_index.json").write_text("{}")
    finished = serve(tmp_path, without_torch, "--model_id", "models")
    failed(finished, "model_index.json does not exist", "name one of the models in it, such as models/flux")


def test_a_gpu_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    finished = serve(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}, "--model_id", "demo", "--device", "cuda")
    failed(finished, "--device is cuda, but no GPU is visible here; use --device cpu.")
    finished = serve(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}, "--model_id", "demo", "--replicas", "2")
    failed(finished, "--replicas is 2, but no GPU is visible here, and each copy of the model takes a GPU of its own")


def test_a_size_to_compile_for_that_the_model_cannot_paint_is_told_so(tmp_path: Path) -> None:
    finished = serve(tmp_path, {}, "--model_id", "demo", "--optimize", "compile", "--warm_sizes", "64x64,100x128")
    failed(finished, "--warm_sizes names 100x128: width must be a multiple of 8, not 100; the nearest fitting: 96")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--warm_sizes", "64x64"], "--warm_sizes has"),
        (["--warm_sizes", "64x64", "--cache_dir", "cache", "--optimize", "safe"], "--warm_sizes and --cache_dir have"),
        (["--warm_sizes", "64x64", "--cache_dir", "cache", "--optimize", "max"], ""),
        (["--optimize", "off"], ""),
    ],
)
def test_what_is_for_compiling_alone_is_told_where_nothing_is_compiled(
    tmp_path: Path, without_torch: dict[str, str], flags: list[str], names: str
) -> None:
    said = serve(tmp_path, without_torch, "--model_id", "nothing", *flags).stderr
    warned = [line for line in said.splitlines() if " WARNING " in line]
    assert len(warned) == bool(names)
    for line in warned:
        assert f" {names} no effect: only --optimize compile and max compile anything" in line


def test_libraries_find_what_the_env_file_has_for_them_and_misspelt_settings_are_told(
    tmp_path: Path, without_torch: dict[str, str]
) -> None:
    lines = "MAX_STEP=7\nHF_HUB_OFFLINE=1\nHF_HOME=of-mine\nHF_TOKEN=hf_x\nMAX_SIDE=512\nHTTPS_PROXY=http://of-mine:1\n"
    (tmp_path / ".env").write_text(lines)
    finished = serve(tmp_path, {"HF_HOME": "elsewhere", **without_torch}, "--model_id", "somebody/some-model")
    failed(finished, "is not in the cache", "HF_HUB_OFFLINE forbids to ask the hub")
    assert not (tmp_path / "of-mine").exists(), "the environment comes first"
    told = [line for line in finished.stderr.splitlines() if ".env has " in line]
    assert [" WARNING " in line for line in told] == [True, False, False, False]
    assert "MAX_STEP, which is no setting (did you mean 'MAX_STEPS'?)" in told[0]
    assert "HF_HUB_OFFLINE, which is no setting; libraries find it" in told[1]
    assert "HF_HOME, which is no setting; the environment has another value, and libraries find that" in told[2]
    assert "HTTPS_PROXY, which is no setting;" in told[3]
    assert "hf_x" not in finished.stderr and "of-mine" not in finished.stderr


def test_what_the_env_file_has_for_torch_comes_before_what_the_server_chooses_by_itself(tmp_path: Path) -> None:
    look = "import os\nprint(os.environ.get('GOMP_SPINCOUNT'), flush=True)\nos._exit(99)\n"
    (tmp_path / "torch.py").write_text(look)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), clean_environment()["PYTHONPATH"]])}
    assert serve(tmp_path, env, "--model_id", "demo").stdout not in ("7\n", "None\n")
    (tmp_path / ".env").write_text("GOMP_SPINCOUNT=7\n")
    assert serve(tmp_path, env, "--model_id", "demo").stdout == "7\n"
    (tmp_path / ".env").write_text("OMP_WAIT_POLICY=ACTIVE\n")
    assert serve(tmp_path, env, "--model_id", "demo").stdout == "None\n", "it would outdo the policy"


# --- KServe's flags and the key, on a running server -----------------------------------------------------------


def test_every_standard_flag_of_kserve_is_accepted() -> None:
    for flag, (value, works) in KSERVE_FLAGS.items():
        name = flag.replace("-", "_")
        for arguments in ([f"--{flag}", value], [f"--{flag}={value}"], [f"--{name}={value}"]):
            settings = read(*arguments)
            assert name in settings.model_fields_set
            assert (name in settings.ignored()) is not works, name


def test_kserves_logging_flags_are_accepted(tmp_path: Path) -> None:
    settings = read("--log_config_file", str(tmp_path / "log.yaml"), "--access_log_format", "%(h)s")
    assert settings.log_config_file == tmp_path / "log.yaml"
    assert settings.access_log_format == "%(h)s"
    assert settings.ignored() == []


@pytest.fixture(scope="module")
def chatty_server(start_server: Callable[..., Server]) -> Server:
    """Every standard flag of KServe, a key, and the most talkative log."""
    flags = [
        f"--{flag}={value}" for flag, (value, _) in KSERVE_FLAGS.items() if flag not in ("http_port", "model_name")
    ]
    return start_server(*flags, "--log_level=debug", "--api_key", KEY, "--access_log_format=%(a)s")


def test_a_server_with_every_standard_flag_of_kserve_says_which_do_nothing(chatty_server: Server) -> None:
    lines = [line for line in chatty_server.log().splitlines() if "does nothing here" in line]
    told = {line.split("the setting ")[1].split()[0] for line in lines}
    assert told == {flag for flag, (_, works) in KSERVE_FLAGS.items() if not works}
    assert httpx.get(f"{chatty_server.url}/docs", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


def test_the_key_never_appears_in_the_log_nor_in_any_answer(chatty_server: Server) -> None:
    request = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
    said = ""
    with httpx.Client(base_url=chatty_server.url, timeout=TIMEOUT) as client:
        for authorization in (f"Bearer {KEY}", f"Basic {KEY}", KEY, f"Bearer {KEY}x", ""):
            headers = {"Authorization": authorization}
            for path in ("/v2", "/metrics", "/openapi.json", "/nothing", "/v2/models/sdxl"):
                said += client.get(path, headers=headers).text
            said += client.post("/v2/models/sdxl/infer", json={}, headers=headers).text
        answer = client.post("/v2/models/sdxl/infer", json=request, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        said += answer.text
    assert KEY not in said
    assert KEY not in chatty_server.log()


def test_the_key_never_appears_in_a_complaint(tmp_path: Path) -> None:
    for arguments in (["--max_steps", "x"], ["--zzz"], ["--max_queue", "1"]):
        assert KEY not in complaint("--api_key", KEY, *arguments, env={"API_KEY": KEY})
    assert KEY not in repr(read("--api_key", KEY))


# --- The end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["listening on", "startup complete", "loading /"])
def test_a_signal_ends_a_start_well_at_whatever_moment_it_comes(
    tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    """Nobody should have to ask twice."""
    command = [sys.executable, "-m", "app", "--model_id", "demo", "--http_port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while moment not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.send_signal(number)
            _, rest = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, said + rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("told", [True, False])
def test_nobody_waits_for_what_is_left_to_compile_where_it_is_for_nobody(tmp_path: Path, told: bool) -> None:
    """Torch has a queue of what is to be compiled, which an interpreter that ends works off."""
    code = (
        "import concurrent.futures, sys, time, app.main, app.errors\n"
        "def load(*given):\n"
        "    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 60)\n"
        "    print('compiling', file=sys.stderr, flush=True)\n"
        f"    {told} and given[-1].wait()\n"
        "    raise app.errors.ModelLoadFailed('No.')\n"
        "app.main._load_family = load\n"
        "sys.exit(app.main.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--http_port", "0", "--optimize", "compile", "--cache_dir", "cache"]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while "compiling" not in said:  # what the log says meanwhile may stand in the same line
                line = process.stderr.readline()
                assert line, said
                said += line
            if told:
                process.send_signal(signal.SIGINT)
            assert process.wait(30) == (0 if told else 1)
            assert (tmp_path / "cache" / compile_cache.TOLD).exists() == told
        finally:
            process.kill()


def test_a_server_that_is_told_to_end_does_so_promptly(chatty_server: Server) -> None:
    started = time.monotonic()
    assert chatty_server.stop() == 0
    assert time.monotonic() - started < 30
