"""The demo model, loaded once: as our family and as the stock pipeline that it must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from app.engine.sdxl import SdxlFamily
from app.engine.weights import DEMO_WEIGHTS, load_family
from app.settings import Settings

SIZE = 128


@pytest.fixture(scope="session")
def family() -> SdxlFamily:
    loaded = load_family(Settings(model_id="demo", device="cpu"))
    assert isinstance(loaded, SdxlFamily)
    return loaded


@pytest.fixture(scope="session")
def stock() -> Iterator[StableDiffusionXLPipeline]:
    """As anyone loads it: nothing of ours but the folder."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
