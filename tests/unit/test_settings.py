"""Settings of models, refiners and adapters, as flags, environment and ``.env`` spell them; tokens stay secret."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidSettings
from app.settings import Settings
from app.settings_sources import load_settings

NOWHERE = Path("/nonexistent/.env")


def load(*arguments: str, env: dict[str, str] | None = None, env_file: Path = NOWHERE) -> Settings:
    return load_settings(arguments, env or {}, env_file)


# --- The .env file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_an_env_file_in_utf_16_is_not_read_as_one_without_the_key(tmp_path: Path, encoding: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("API_KEY=secret\n", encoding=encoding)
    with pytest.raises(InvalidSettings, match=r"\.env cannot be read"):
        load(env_file=env_file)


@pytest.mark.parametrize(
    "line", ['API_KEY="open', "API_KEY='it's'", 'API_KEY="a"b"', "API_KEY: geheim", "API_KEY geheim"]
)
def test_a_line_of_the_env_file_that_cannot_be_read_is_not_left_out(tmp_path: Path, line: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(f"# who may ask\n\n{line}\nMAX_STEPS=20\n")
    with pytest.raises(InvalidSettings, match=r"\.env cannot be read in line 3: it must be NAME=value") as told:
        load(env_file=env_file)
    assert "geheim" not in str(told.value)


def test_an_env_file_that_cannot_be_seen_is_told_and_not_left_out(tmp_path: Path) -> None:
    """As in the working directory of another user, in which ``sudo -u`` leaves who calls it."""
    if os.geteuid() != 0:
        tmp_path.chmod(0)
    effective = os.geteuid()
    with contextlib.suppress(PermissionError):
        os.seteuid(65534)
    try:
        with pytest.raises(InvalidSettings, match=r"cannot be read: .*Permission denied"):
            load(env_file=tmp_path / ".env")
    finally:
        os.seteuid(effective)
        tmp_path.chmod(0o700)


def test_an_empty_folder_in_place_of_the_env_file_is_told_and_a_virtual_environment_is_none_of_ours(
    tmp_path: Path,
) -> None:
    env_file = tmp_path / ".env"
    env_file.mkdir()
    with pytest.raises(InvalidSettings, match="is an empty folder, as docker makes one"):
        load(env_file=env_file)
    (env_file / "pyvenv.cfg").touch()
    assert load(env_file=env_file) == Settings()


def test_help_does_not_wait_for_the_env_file_to_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("API_KEY geheim\n")
    with pytest.raises(SystemExit) as ended:
        load("--help", env_file=env_file)
    assert ended.value.code == 0
    assert "--api_key" in capsys.readouterr().out


def test_what_is_left_empty_is_not_given_there(tmp_path: Path) -> None:
    """As templates leave what nobody filled in: neither an error, nor the end of the key that another source has."""
    empty = {name.upper(): "" for name in Settings.model_fields} | {"HF_TOKEN": " ", "KSERVE_TLS_CERT_FILE": ""}
    assert load(env=empty) == Settings()
    env_file = tmp_path / ".env"
    env_file.write_text("API_KEY=secret\nMAX_STEPS=7\nMODEL_NAME=\nHF_TOKEN=hf_abc\n")
    settings = load(env=empty, env_file=env_file)
    assert settings.api_key is not None and settings.api_key.get_secret_value() == "secret"
    assert settings.huggingface_token is not None and settings.huggingface_token.get_secret_value() == "hf_abc"
    assert (settings.max_steps, settings.model_name) == (7, "model")
    assert load(env=empty | {"API_KEY": "none"}, env_file=env_file).api_key is None


def test_words_may_be_in_capitals() -> None:
    settings = load("--model_type=FLUX", env={"LOG_LEVEL": "INFO", "LOG_FORMAT": "Json", "DEVICE": "CUDA:1"})
    assert (settings.model_type, settings.log_level, settings.log_format) == ("flux", "info", "json")
    assert settings.device == "cuda:1"
    assert load(env={"REPLICAS": "AUTO", "MODEL_NAME": "SDXL"}).replicas == "auto"
    assert load(env={"MODEL_NAME": "SDXL"}).model_name == "SDXL"


# --- Several values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lora", "a=/x", "--lora", "b=/y:0.5"],
        ["--lora=a=/x", "--lora=b=/y:0.5"],
        ["--lora", "a=/x,b=/y:0.5"],
        ["--lora", " a=/x , b=/y:0.5 ,"],
    ],
)
def test_adapters_may_be_repeated_or_separated_by_commas(arguments: list[str]) -> None:
    assert load(*arguments).lora == ("a=/x", "b=/y:0.5")


def test_adapters_come_from_the_environment_and_the_env_file_as_one_text(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text('LORA="a=/x, b=/y"\n')
    assert load(env_file=env_file).lora == ("a=/x", "b=/y")
    assert load(env={"LORA": "c=/z"}, env_file=env_file).lora == ("c=/z",)
    # A flag takes the place of all others, it does not add to them.
    assert load("--lora", "d=/w", env={"LORA": "c=/z"}, env_file=env_file).lora == ("d=/w",)


@pytest.mark.parametrize("text", ["", "none", " None ", ","])
def test_adapters_that_the_environment_names_can_be_unset(text: str) -> None:
    assert load("--lora", text, env={"LORA": "a=/x"}).lora == ()


# --- Models ----------------------------------------------------------------------------------------------------


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / ".env").write_text("SINGLE_FILE_MODEL=~/sd.safetensors\nAPI_KEY=~/\n")
    flags = ["--model_id=~/sdxl", "--cache_dir=~/c", "--lora=my-style=~/a.safetensors:0.5,other=b~/c.safetensors"]
    settings = load_settings(flags, {}, tmp_path / ".env")
    assert settings.model_id == "/home/me/sdxl"
    assert settings.cache_dir == Path("/home/me/c")
    assert settings.lora == ("my-style=/home/me/a.safetensors:0.5", "other=b~/c.safetensors")
    assert settings.single_file_model == Path("/home/me/sd.safetensors")
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "~/"


def test_model_and_refiner_may_be_folders_names_or_files() -> None:
    settings = load(
        *("--model_id", "stabilityai/stable-diffusion-xl-base-1.0"),
        *("--single-file-model", "/models/base.safetensors"),
        *("--refiner_id", "/models/refiner", "--use-refiner"),
        env={"REFINER_SINGLE_FILE_MODEL": "/models/refiner.safetensors", "CONFIG_DIR": "/models/config"},
    )
    assert settings.single_file_model == Path("/models/base.safetensors")
    assert settings.refiner_single_file_model == Path("/models/refiner.safetensors")
    assert settings.config_dir == Path("/models/config") and settings.refiner_config_dir is None
    assert settings.use_refiner and settings.refiner_id == "/models/refiner"


@pytest.mark.parametrize("name", ["single_file_model", "config_dir", "refiner_id", "huggingface_token"])
def test_what_may_be_unset_is_unset_by_nothing_and_by_none(name: str) -> None:
    for text in ("", "none", "None"):
        assert getattr(load(f"--{name}", text, env={name.upper(): "x"}), name) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--warm_sizes", "64x64,96x64"],
        ["--warm_sizes", "64x64", "96x64"],
        ["--warm_sizes", "64x64", "--http_port", "9000", "--warm_sizes=96x64"],
    ],
)
def test_several_values_are_given_as_people_give_them(arguments: list[str]) -> None:
    assert load(*arguments).warm_sizes == ("64x64", "96x64")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--model_type", "sd15", "must be one of auto, sdxl, flux"),
        ("--quantization", "int3", "must be one of none, fp8, int8, nf4"),
        ("--device", "gpu", "--device is 'gpu'"),
        ("--device", "enable_offload", "--device is 'enable_offload'"),
        ("--device", "cuda:256", "--device is 'cuda:256'"),
        ("--api_key", "first\nsecond", "--api_key must be one line"),
        ("--huggingface_token", "hf_first\nhf_second", "--huggingface_token must be one line"),
        ("--huggingface_token", "“hf_copied”", "--huggingface_token must be the token alone"),
        ("--use_refiner", "perhaps", "must be true or false"),
        ("--max_input_pixels", "63", "--max_input_pixels is '63'"),
        ("--vae_tilling", "true", "did you mean '--vae_tiling'?"),
        ("--refiner_id", " ", ""),
    ],
)
def test_a_wrong_value_is_one_sentence(flag: str, value: str, says: str) -> None:
    if not says:
        assert load(flag, value).refiner_id is None
        return
    with pytest.raises(InvalidSettings) as refused:
        load(flag, value)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", "enable_model_cpu_offload",
                                    "enable_sequential_cpu_offload", "enable_group_offload"])  # fmt: skip
def test_every_device_is_known_by_its_name(device: str) -> None:
    assert load("--device", device).device == device


# --- Tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "token"),
    [
        ({"HUGGINGFACE_TOKEN": "hf_own"}, "hf_own"),
        ({"HF_TOKEN": "hf_usual"}, "hf_usual"),
        ({"HF_TOKEN": "hf_usual", "HUGGINGFACE_TOKEN": "hf_own"}, "hf_own"),
        ({"HF_TOKEN": " hf_spaced\n"}, "hf_spaced"),
        ({"HF_TOKEN": "hf_usual", "HUGGINGFACE_TOKEN": ""}, "hf_usual"),
    ],
)
def test_the_hubs_usual_variable_is_read_where_our_own_is_not_there(env: dict[str, str], token: str) -> None:
    found = load(env=env).huggingface_token
    assert found is not None and found.get_secret_value() == token


def test_the_hubs_usual_variable_is_read_from_the_env_file_too(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("HF_TOKEN=hf_file\n")
    found = load(env_file=env_file).huggingface_token
    assert found is not None and found.get_secret_value() == "hf_file"


@pytest.mark.parametrize("name", ["huggingface_token", "api_key"])
def test_a_secret_is_never_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_very_secret"
    settings = load(f"--{name}", secret)
    assert secret not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    wrong: Any = {name: ["not", secret]}
    for arguments in ([f"--{name}", secret, "--max_steps", "0"], [f"--{name}={secret}", "--unknown"], ["--help"]):
        with pytest.raises((InvalidSettings, SystemExit)) as ended:
            load(*arguments, env={name.upper(): secret})
        assert secret not in str(ended.value)
    assert secret not in capsys.readouterr().out
    with pytest.raises(ValueError, match=name):
        Settings(**wrong)


def test_every_limit_of_a_request_is_a_setting() -> None:
    settings = load("--max_input_pixels", "4096", "--max_side", "64", "--max_steps", "9", "--max_pixels", "4096")
    limits = settings.limits
    assert (limits.max_input_pixels, limits.max_side, limits.max_steps, limits.max_pixels) == (4096, 64, 9, 4096)
    assert limits.max_images_per_request == settings.max_images_per_request
    assert limits.max_prompt_length == settings.max_prompt_length
