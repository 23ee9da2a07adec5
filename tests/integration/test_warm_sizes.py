"""``--warm_sizes`` over the whole start: what is compiled for, what the server paints for itself, and what is refused.

What is compiled here stops before machine code, which takes minutes.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.engine.compiled import Compiler
from app.engine.family import Family
from app.engine.optimization import Optimization
from app.errors import ModelLoadFailed, OutOfMemory
from app.main import create_app
from app.settings import Settings
from tests.fakes import Instant
from tests.integration.test_app import INFER, metric, prompt, running


@pytest.fixture(autouse=True)
def no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(Optimization, "compiler", lambda self: Compiler("eager") if self.compiles else None)


@pytest.mark.parametrize("model", ["sdxl", "flux"])
async def test_what_the_server_paints_for_itself_has_a_size_that_was_compiled_for(
    model: str, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    if model == "sdxl":
        # One model shows that a server's own thread can trace.
        request.getfixturevalue("untraced")
    caplog.set_level(logging.INFO)
    common: dict[str, Any] = {"model_id": "demo", "model_type": model, "optimize": "compile", "warm_up": True}
    async with running(None, **common, warm_sizes=("64x64",)) as client:
        answer = await client.post(INFER, json=prompt(num_inference_steps=1, width=64, height=64))
        assert answer.status_code == 200, answer.text
        assert metric((await client.get("/metrics")).text, "sdxl_unexpected_shapes_total") == 0
        assert not told(caplog)
        answer = await client.post(INFER, json=prompt(num_inference_steps=1, width=96, height=64))
        assert answer.status_code == 200, answer.text
        assert metric((await client.get("/metrics")).text, "sdxl_unexpected_shapes_total") > 0
    # Latents with guidance for SDXL, and tokens of 2 x 2 latents without it for FLUX.
    assert ("tensors of 2x4x8x12, " if model == "sdxl" else "tensors of 1x24x") in told(caplog)[0]
    assert "compiling for 64 x 64 pixels, 1 row" in caplog.messages


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of shapes that nobody had prepared for."""
    return [message for message in caplog.messages if message.startswith("nothing was compiled for")]


# --- What cannot be prepared for -------------------------------------------------------------------------------


class FullWhenWarmed(Instant):
    """Has no room for all that it is to be warmed with."""

    def warm(self, report: Callable[[str], None]) -> None:
        raise OutOfMemory("The device has too little memory for this request.")


class MustNotBeWarmed(Instant):
    """Would take minutes to compile."""

    def warm(self, report: Callable[[str], None]) -> None:
        raise AssertionError("it is compiled before all sizes are known to fit")


async def reason(monkeypatch: pytest.MonkeyPatch, family: Family[Any], **settings: Any) -> str:
    """Why the start ends."""
    monkeypatch.setattr("app.engine.weights.load_family", lambda *_: family)
    failures: queue.Queue[BaseException] = queue.Queue()
    app = create_app(Settings(model_id="demo", grace_period=1.0, **settings), on_failure=failures.put)
    async with app.router.lifespan_context(app):
        error = failures.get(timeout=30)
    assert isinstance(error, ModelLoadFailed), error
    return str(error)


async def test_a_size_that_the_model_cannot_paint_is_named_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"optimize": "max", "warm_sizes": ("64x64", "100x128")}
    said = await reason(monkeypatch, MustNotBeWarmed(), **sizes)
    assert said == "--warm_sizes names 100x128: width must be a multiple of 8, not 100."


@pytest.mark.parametrize(("sizes", "named"), [(("64x64", "96x64"), "64x64, 96x64"), ((), "the model's own")])
async def test_sizes_that_the_device_is_too_small_for_are_named(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...], named: str
) -> None:
    said = await reason(monkeypatch, FullWhenWarmed(), optimize="max", warm_sizes=sizes)
    assert said == (
        f"The device has too little memory to prepare for --warm_sizes ({named}); name smaller ones, or take "
        "--optimize safe."
    )


async def test_sizes_that_nothing_is_compiled_for_need_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.weights.load_family", lambda *_: Instant())
    async with running(None, model_id="demo", optimize="safe", warm_sizes=("100x128",)) as client:
        assert (await client.post(INFER, json=prompt())).status_code == 200
