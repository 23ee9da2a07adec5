"""Broken weights end the server with exit code 1 and one sentence that names the file, before torch is imported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.weights import DEMO_WEIGHTS
from app.errors import InvalidRequest, ModelLoadFailed, OutOfMemory
from app.main import _why
from app.settings import Settings
from tests.e2e.conftest import clean_environment
from tests.e2e.test_command_line import failed, run

DEMO = DEMO_WEIGHTS / "sdxl"
UNET = "unet/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5135149760\n"


def serve(folder: Path, *arguments: str) -> Any:
    """The server in an environment in which importing torch would end it with another code."""
    (folder / "sabotage").mkdir()
    (folder / "sabotage" / "torch.py").write_text("import os\nos._exit(99)\n")
    path = os.pathsep.join([str(folder / "sabotage"), clean_environment()["PYTHONPATH"]])
    return run(folder, "--http_port", "0", *arguments, env={"PYTHONPATH": path})


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def truncate(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


IN_A_FOLDER: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "cut": (lambda m: truncate(m / UNET, 100_000), UNET, "is cut off: it has 100000 bytes and should have"),
    "a-wrong-length": (
        lambda m: (m / UNET).write_bytes(b"\xff" * 8 + b"{}" * 50),
        UNET,
        "is cut off: its header alone",
    ),
    "no-component": (lambda m: shutil.rmtree(m / "vae"), "vae", "does not exist, but model_index.json names it"),
    "a-program": (lambda m: (m / "run.py").write_text(""), "run.py", "is a program"),
    "pickled": (lambda m: (m / UNET).rename(m / "unet/x.bin"), "unet/x.bin", "holds pickled weights, which can run"),
    "no-shard": (
        lambda m: (m / UNET).rename(m / f"{UNET}.index.json").write_text('{"weight_map": {"a": "s.safetensors"}}'),
        "unet/s.safetensors",
        "does not exist, but diffusion_pytorch_model.safetensors.index.json names it",
    ),
}


@pytest.mark.parametrize(("damage", "file", "says"), IN_A_FOLDER.values(), ids=IN_A_FOLDER.keys())
def test_a_broken_folder_is_told_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], Any], file: str, says: str
) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    damage(tmp_path / "model")
    failed(serve(tmp_path, "--model_id", "model"), f"model/{file} {says}")


SINGLE_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("x.safetensors", lambda _: None, "does not exist; check the name"),
    "a-folder": ("x.safetensors", lambda path: path.mkdir(), "is a folder, where one .safetensors file was expected"),
    "a-ckpt": ("x.ckpt", lambda path: path.write_bytes(b"PK\x03\x04"), "holds pickled weights"),
    "a-pickle": ("x.safetensors", lambda path: path.write_bytes(b"\x80\x02}q"), "holds pickled weights under the name"),
    "a-pointer": ("x.safetensors", lambda path: path.write_text(POINTER), "is a Git LFS pointer"),
    "a-web-page": ("x.safetensors", lambda path: path.write_text("<html>"), "is a web page and not the weights"),
    "no-model": ("x.safetensors", lambda path: save_file({"a": torch.zeros(1)}, path), "is neither an SDXL nor a FLUX"),
}


@pytest.mark.parametrize(("name", "make", "says"), SINGLE_FILES.values(), ids=SINGLE_FILES.keys())
def test_a_broken_single_file_is_told_in_one_sentence(
    tmp_path: Path, name: str, make: Callable[[Path], Any], says: str
) -> None:
    make(tmp_path / name)
    failed(serve(tmp_path, "--single_file_model", name), f"{name} {says}")


# --- What only painting shows ----------------------------------------------------------------------------------


def fill_with_nan(path: Path) -> None:
    save_file({name: torch.full_like(each, torch.nan) for name, each in load_file(path).items()}, path)


def test_weights_that_are_no_numbers_are_told_about_the_model(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    fill_with_nan(tmp_path / "model/text_encoder/model.safetensors")
    finished = run(tmp_path, "--http_port", "0", "--model_id", "model")
    failed(finished, "model cannot paint a picture: its weights or its configuration are probably damaged")
    # What a caller could have done about it is none of the reader's business.
    assert "not finite)); download it again" in finished.stderr and "scheduler" not in finished.stderr


def test_a_configuration_that_leads_nowhere_is_told_about_the_model_and_logged(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    change_json(tmp_path / "model/vae/config.json", scaling_factor=None)
    (tmp_path / "log").touch()
    finished = run(tmp_path, "--http_port", "0", "--model_id", "model", "--termination_log", "log")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    sentence = (tmp_path / "log").read_text()
    assert finished.stderr.endswith(f"sdxl-runtime: {sentence}\n")
    assert sentence.startswith("model cannot paint a picture: its weights or its configuration are ")
    assert "(TypeError: unsupported operand type(s) for /" in sentence


@pytest.mark.parametrize(
    "error",
    [
        ModelLoadFailed("x.safetensors is empty."),
        OutOfMemory("There is too little memory."),
        ImportError("libcudart.so.13: cannot open shared object file"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistStoreError("wait timeout"),
    ],
    ids=repr,
)
def test_what_is_not_the_models_fault_keeps_its_own_words(error: Exception) -> None:
    assert _why(error, Settings()) == str(error)


def test_the_refiner_may_be_to_blame_too(tmp_path: Path) -> None:
    settings = Settings(model_id="base", use_refiner=True, refiner_id="fine")
    for error in (RuntimeError("mat1 and mat2"), InvalidRequest("No; ask again.")):
        assert _why(error, settings).startswith("base with the refiner fine cannot paint a picture: ")


def test_a_broken_refiner_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    arguments = ["--model_id", "demo", "--use_refiner", "--refiner_single_file_model", "x.safetensors"]
    failed(serve(tmp_path, *arguments), "x.safetensors is empty; download it again")
