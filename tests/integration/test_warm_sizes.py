"""``--warm_sizes`` over the whole start: what is compiled for, what the server paints for itself, and what is refused.

What is compiled here stops before machine code, which takes minutes.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from app.engine.compiled import Compiler
from app.engine.optimization import Optimization
from tests.integration.test_app import INFER, metric, prompt, running


@pytest.fixture(autouse=True)
def no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(Optimization, "compiler", lambda self: Compiler("eager") if self.compiles else None)


@pytest.mark.parametrize("model", ["sdxl", "flux"])
async def test_what_the_server_paints_for_itself_has_a_size_that_was_compiled_for(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    common: dict[str, Any] = {"model_id": "demo", "model_type": model, "optimize": "compile", "warm_up": True}
    async with running(None, **common, warm_sizes=("64x64",)) as client:
        answer = await client.post(INFER, json=prompt(num_inference_steps=1, width=64, height=64))
        assert answer.status_code == 200, answer.text
        assert metric((await client.get("/metrics")).text, "sdxl_unexpected_shapes_total") == 0
    assert "nothing was compiled for the shape" not in caplog.text
