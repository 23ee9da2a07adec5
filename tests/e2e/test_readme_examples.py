"""The README's examples of asking, run as they stand, one after the other, against a server as the README starts it."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from app.engine.weights import DEMO_WEIGHTS
from tests.e2e.conftest import REPOSITORY, Server, clean_environment
from tests.readme import README

TIMEOUT = 300
EXAMPLES = re.findall(r"^```(python|sh)\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
ASKING = [(language, text) for language, text in EXAMPLES if "localhost:8080" in text]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """With the adapters of the README, of random weights."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(pipeline.unet)
    (flags,) = [text for language, text in EXAMPLES if language == "sh" and "--lora" in text]
    loras = re.findall(r"--lora (\w+)=/path/to/(\S+)", flags)
    assert len(loras) == 2
    for _, file in loras:
        pipeline.save_lora_weights(folder, weight_name=file.partition(":")[0], unet_lora_layers=layers)
    return start_server(*(part for name, file in loras for part in ("--lora", f"{name}={folder / file}")))


def test_every_example_runs_as_it_stands(server: Server, tmp_path: Path) -> None:
    assert [language for language, _ in ASKING] == ["sh", "python", "python", "sh", "python", "sh", "sh", "sh"]
    answers = []
    for language, text in ASKING:
        program = ["sh", "-euc"] if language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*program, text.replace("localhost:8080", server.host)],
            cwd=tmp_path,
            env=clean_environment(PYTHONPATH=str(REPOSITORY)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), text
        answers.append(done.stdout)
    pictures = {path.name: Image.open(path).convert("RGB") for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"circle.png", "blue.png", "star.png", "styled.png"}
    circle, star = pictures["circle.png"], pictures["star.png"]
    # Inpainting keeps the margin, but for what the decoder makes of it.
    for margin in ((0, 0, 128, 8), (0, 120, 128, 128)):
        pairs = zip(circle.crop(margin).tobytes(), star.crop(margin).tobytes(), strict=True)
        assert max(abs(one - other) for one, other in pairs) < 16
    # Where there was red is blue now.
    for name, channel in (("circle.png", 0), ("blue.png", 2), ("star.png", 2)):
        middle = pictures[name].getpixel((64, 64))
        assert isinstance(middle, tuple) and middle[channel] == max(middle) > 2 * min(middle), name
    assert circle.tobytes() != pictures["styled.png"].tobytes()
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert base64.b64decode(answer["outputs"][0]["data"][0]).startswith(b"\x89PNG")
    assert json.loads(answers[-1])["predictions"][0]["image"]["format"] == "PNG"
