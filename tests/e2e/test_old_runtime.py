"""What started the runtime that this one takes the place of starts this one: flags, variables and the .env file.

Source: the README of its repository, and its scripts ``start-base.sh`` and ``start-refiner.sh``.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.engine.flux import FluxFamily
from app.engine.sdxl import SdxlFamily
from app.settings_sources import load_settings
from tests import exporting
from tests.e2e.conftest import Server, running_server
from tests.hub import Hub, serving
from tests.integration.stock import ours
from tests.small_models import load_demo, make_refiner
from tests.tiny_flux import make_flux

ASKED = {"prompt": "a red circle on a white background", "num_inference_steps": 3, "seed": 4}
FLUX = "black-forest-labs/FLUX.1-schnell"
TOKEN = "hf_of_the_old_days"


def paint(server: Server, model: str, **parameters: Any) -> np.ndarray:
    inputs = [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [ASKED["prompt"]]}]
    rest = {name: value for name, value in {**ASKED, **parameters}.items() if name != "prompt"}
    body = {"inputs": inputs, "parameters": rest}
    answer = httpx.post(f"{server.url}/v2/models/{model}/infer", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["outputs"][0]["data"][0]))))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume as people mounted it: base and refiner, each with its single file."""
    folder = tmp_path_factory.mktemp("models")
    base = load_demo()
    for pipeline, name in ((base, "base"), (make_refiner(base), "refiner")):
        pipeline.save_pretrained(folder / name)
        exporting.export_sdxl(pipeline, folder / name / f"sd_xl_{name}_1.0.safetensors")
    return folder


def test_the_script_with_base_and_refiner_as_single_files_starts_and_paints(models: Path, tmp_path: Path) -> None:
    flags = [
        f"--single_file_model={models}/base/sd_xl_base_1.0.safetensors",
        "--use_refiner=True",
        f"--refiner_single_file_model={models}/refiner/sd_xl_refiner_1.0.safetensors",
        "--device=enable_sequential_cpu_offload",
        "--enable_docs_url=True",
        "--workers=1",
    ]
    with running_server(tmp_path, *flags, env={"CUDA_VISIBLE_DEVICES": ""}, model=["--model_name=sdxl"]) as server:
        refined = paint(server, "sdxl", denoising_limit=0.5)
        assert "no GPU is visible here: the model runs on the CPU" in server.log()
        assert "the refiner shares text_encoder_2 and tokenizer_2 and vae with the base" in server.log()
    base = load_demo()
    family = SdxlFamily(base, make_refiner(base))
    assert np.array_equal(refined, ours(family, **ASKED, denoising_limit=0.5))


def test_the_flux_example_downloads_the_model_with_the_token_of_the_env_file_and_needs_no_hub_the_next_time(
    tmp_path: Path,
) -> None:
    mount = Path("/mnt/models")
    if mount.exists() and any(mount.iterdir()):
        pytest.skip("a model is mounted here, and this is about no mount")
    flux = make_flux(guidance_embeds=False, use_dynamic_shifting=False)
    flux.save_pretrained(tmp_path / "repository")
    (tmp_path / "repository" / "flux1-schnell.safetensors").write_bytes(b"not needed")
    expected = ours(FluxFamily(flux), **ASKED)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".env").write_text(f"HUGGINGFACE_TOKEN={TOKEN}\nMODEL_NAME=flux\n")
    broken = {"transformer/diffusion_pytorch_model.safetensors": 200_000}
    with serving(Hub({FLUX: tmp_path / "repository"}, token=TOKEN, breaks=broken)) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        flags = ["--model-type=flux", "--device=enable_model_cpu_offload"]
        with running_server(tmp_path / "work", *flags, env=environment, model=()) as server:
            assert np.array_equal(paint(server, "flux"), expected)
            log = server.log()
        assert f"nothing is mounted at /mnt/models: taking {FLUX} from the hub" in log
        assert f"downloading {FLUX}: " in log
        assert "the connection to the hub broke in the middle of a file: resuming it" in log
        assert TOKEN not in log
        assert "flux1-schnell.safetensors" not in hub.downloaded()
        assert [range_ for _, _, range_ in hub.requests if range_]
    with running_server(tmp_path / "work", *flags, env=environment, model=()) as server:
        assert np.array_equal(paint(server, "flux"), expected)
        log = server.log()
        assert "the hub cannot be reached (ConnectError: " in log
        assert f"taking {FLUX} from the cache" in log


# --- Every spelling --------------------------------------------------------------------------------------------


@pytest.fixture
def no_env_file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / ".env"


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--model_id=/mnt/models/base"], {"model_id": "/mnt/models/base"}),
        (["--single_file_model", "/m/x.safetensors"], {"single_file_model": Path("/m/x.safetensors")}),
        (["--use_refiner=True"], {"use_refiner": True}),
        (["--use_refiner", "True"], {"use_refiner": True}),
        (["--use_refiner=False"], {"use_refiner": False}),
        (["--use_refiner", "False", "--model_name", "m"], {"use_refiner": False, "model_name": "m"}),
        (["--refiner_id=/mnt/models/refiner"], {"refiner_id": "/mnt/models/refiner"}),
        (["--refiner_single_file_model=/m/r.safetensors"], {"refiner_single_file_model": Path("/m/r.safetensors")}),
        (["--device=cuda"], {"device": "cuda"}),
        (["--device=cpu"], {"device": "cpu"}),
        (["--device=enable_model_cpu_offload"], {"device": "enable_model_cpu_offload"}),
        (["--device", "enable_sequential_cpu_offload"], {"device": "enable_sequential_cpu_offload"}),
        (["--model_type=sdxl"], {"model_type": "sdxl"}),
        (["--model-type=flux"], {"model_type": "flux"}),
        (["--model-type", "flux"], {"model_type": "flux"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_flag_is_read_as_it_was_and_so_are_variables_and_env_files(
    no_env_file: Path, flags: list[str], settings: dict[str, Any]
) -> None:
    defaults = load_settings([], {}, no_env_file)
    assert load_settings(flags, {}, no_env_file) == defaults.model_copy(update=settings)
    variables = {name.upper(): str(value) for name, value in settings.items()}
    assert load_settings([], variables, no_env_file) == defaults.model_copy(update=settings)
    no_env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    assert load_settings([], {}, no_env_file) == defaults.model_copy(update=settings)


@pytest.mark.parametrize("name", ["HUGGINGFACE_TOKEN", "HF_TOKEN"])
def test_the_token_is_read_from_either_variable(no_env_file: Path, name: str) -> None:
    for settings in (load_settings([], {name: TOKEN}, no_env_file), load_settings([], {}, _file(no_env_file, name))):
        assert settings.huggingface_token is not None
        assert settings.huggingface_token.get_secret_value() == TOKEN
        assert TOKEN not in repr(settings)


def _file(path: Path, name: str) -> Path:
    path.write_text(f"{name}={TOKEN}\n")
    return path


def test_a_volume_with_nothing_but_single_files_and_no_refiner_wanted_starts(models: Path, tmp_path: Path) -> None:
    """The default of the old start script, its refiner flags left in with ``--use_refiner=False``."""
    from app.engine.weights import find_base

    shutil.copytree(models / "base", tmp_path / "models")
    flags = [
        f"--single_file_model={tmp_path}/models/sd_xl_base_1.0.safetensors",
        "--use_refiner=False",
        "--refiner_single_file_model=/nowhere/refiner.safetensors",
    ]
    source = find_base(load_settings(flags, {}, tmp_path / ".env"), lambda _: None)
    assert source.kind == "sdxl"
