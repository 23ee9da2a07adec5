"""The demo model, loaded once: as our family and as the stock pipeline that it must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from app.engine.sdxl import SdxlFamily
from app.engine.weights import DEMO_WEIGHTS, load_family
from app.settings import Settings

SIZE = 128


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be compiled stays as it is written, which saves tracing it: shapes are warmed and counted all the
    same."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


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


@pytest.fixture(scope="session")
def stock_refiner(stock: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """A refiner of random weights: it refines nothing, but every pixel depends on how it is asked."""
    config = {**stock.unet.config, "cross_attention_dim": 64, "projection_class_embeddings_input_dim": 64 + 5 * 8}
    torch.manual_seed(0)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=stock.vae,
        text_encoder=None,
        text_encoder_2=stock.text_encoder_2,
        tokenizer=None,
        tokenizer_2=stock.tokenizer_2,
        unet=UNet2DConditionModel.from_config(config).eval(),
        scheduler=type(stock.scheduler).from_config(stock.scheduler.config),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def refined(stock: StableDiffusionXLPipeline, stock_refiner: StableDiffusionXLImg2ImgPipeline) -> SdxlFamily:
    return SdxlFamily(stock, stock_refiner)
