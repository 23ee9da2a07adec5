"""One FLUX in two processes that torchrun started: one server, the pictures of one process, one end for both."""

from __future__ import annotations

import base64
import functools
import io
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app.engine.weights import load_family
from app.settings import Settings
from tests.e2e.conftest import Server, launch
from tests.integration.stock import ours
from tests.waiting import until

TIMEOUT = 120.0
MODEL = ("--model_id=demo", "--model_type=flux", "--model_name=flux", "--device=cpu", "--http_port=0")
SHORT: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 4}
LONG: dict[str, Any] = {"prompt": "a blue square", "seed": 1, "num_inference_steps": 100}


class Pair(Server):
    """A server that torchrun runs as two processes; `process` is torchrun's own."""

    def rank(self, rank: int) -> int:
        """The id of the process of that rank."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="utf-8").split()
        return next(
            int(child)
            for child in children
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        )

    def paint(self, **parameters: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v2/models/flux/generate", json=parameters, timeout=TIMEOUT)

    def paint_meanwhile(self, pool: ThreadPoolExecutor, **parameters: Any) -> Future[httpx.Response]:
        """Ask, and return as soon as steps are taken."""
        before = self.metric("sdxl_steps_total")
        answer = pool.submit(self.paint, **parameters)
        wait_for(lambda: self.metric("sdxl_steps_total") > before)
        return answer


@contextmanager
def torchrun(folder: Path, command: tuple[str, ...], *flags: str) -> Iterator[Pair]:
    """A ready server of the demo FLUX in two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    process, log_path = launch([*run, *MODEL, *flags], folder)
    try:
        server = Pair(process, log_path)
        server.wait_until_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(TIMEOUT)
        finally:
            process.kill()
            process.wait()


wait_for = functools.partial(until, seconds=TIMEOUT)


def shown(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["outputs"][0]["data"][0])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA adapter of random weights for the demo FLUX, as ``--lora`` names it."""
    torch.manual_seed(0)
    layers = {}
    for name in ("to_q", "to_k", "to_v"):
        for part, shape in (("A", (4, 128)), ("B", (128, 4))):
            layers[f"transformer.single_transformer_blocks.0.attn.{name}.lora_{part}.weight"] = torch.randn(shape) / 4
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(layers, path)
    return f"style={path}"


@pytest.fixture(scope="module")
def pair(adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with torchrun(tmp_path_factory.mktemp("pair"), ("-m", "app"), "--lora", adapter) as server:
        yield server


def test_two_processes_paint_what_one_does(pair: Pair, adapter: str) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "a red circle", "seed": 1, "num_inference_steps": 4},
        {"prompt": "a blue square", "seed": 2, "num_inference_steps": 7},
        {"prompt": "a green star", "seed": 3, "num_inference_steps": 5, "loras": {"style": 1.0}},
        {"prompt": "a red star", "negative_prompt": "blue", "true_cfg_scale": 2.0, "seed": 4, "num_inference_steps": 3},
        # Tokens of the picture and of the prompt in odd numbers: the shares differ.
        {"prompt": "a circle", "seed": 5, "num_inference_steps": 3, "height": 80, "width": 80},
        {"prompt": "a circle", "seed": 6, "num_inference_steps": 3, "max_sequence_length": 33},
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: pair.paint(**request), requests))
    family = load_family(Settings(model_id="demo", model_type="flux", device="cpu", lora=(adapter,)))
    for request, answer in zip(requests, answers, strict=True):
        loras = {"loras": tuple(request["loras"].items())} if "loras" in request else {}
        assert furthest(shown(answer), ours(family, **{**request, **loras})) <= 2, request
    assert furthest(shown(answers[2]), ours(family, prompt="a green star", seed=3, num_inference_steps=5)) > 2


def test_what_is_too_little_to_share_is_refused(pair: Pair) -> None:
    answer = pair.paint(prompt="", max_sequence_length=1)
    assert answer.status_code == 400 and "max_sequence_length must be at least 2" in answer.json()["error"]
    answer = pair.paint(prompt="", height=16, width=16)
    assert answer.status_code == 400 and "ask for at least 16 x 32" in answer.json()["error"]


def test_one_signal_ends_both_once_what_was_accepted_is_done(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("sdxl-runtime"))
    flags = ("--quantization=fp8", "--optimize=safe")
    with torchrun(tmp_path, ("--no_python", program), *flags) as server, ThreadPoolExecutor(1) as pool:
        ranks = server.rank(0), server.rank(1)
        small = server.paint(**SHORT)
        answer = server.paint_meanwhile(pool, **{**LONG, "num_inference_steps": 40})
        server.process.terminate()
        assert answer.result().status_code == 200
        server.process.wait(TIMEOUT)
        assert not any(map(is_running, ranks))
        assert "Finished server process" in server.log()
        assert "lost" not in server.log() and "SIGKILL" not in server.log()
    family = load_family(Settings(model_id="demo", model_type="flux", device="cpu", quantization="fp8"))
    assert furthest(shown(small), ours(family, **SHORT)) <= 2


def test_a_process_that_hangs_or_dies_takes_the_server_with_it(tmp_path: Path) -> None:
    with torchrun(tmp_path, ("-m", "app"), "--step_timeout=0.5") as server, ThreadPoolExecutor(1) as pool:
        ranks = server.rank(0), server.rank(1)
        answer = server.paint_meanwhile(pool, **LONG)
        os.kill(ranks[1], signal.SIGSTOP)
        assert answer.result().status_code == 500 and "must be restarted" in answer.result().json()["error"]
        wait_for(lambda: httpx.get(f"{server.url}/v2/health/live", timeout=TIMEOUT).status_code == 503)
        assert server.paint(**LONG).status_code == 503

        os.kill(ranks[1], signal.SIGKILL)
        assert server.process.wait(TIMEOUT) != 0
        assert not any(map(is_running, ranks))
