"""What half precision may do to a picture: never a black one with status 200."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from app.engine.sdxl import SdxlFamily
from app.engine.vae import Vae
from app.errors import GenerationFailed
from app.generation import GenerateRequest
from tests.integration.stock import mask, ours, picture, theirs

PROMPT = "a red circle on a white background"
SMALL = {"height": 64, "width": 64}
"""Pixels: most CPUs emulate half precision, which takes long."""


class Overflowing(torch.nn.Module):
    """A last layer whose numbers leave float16, as those of SDXL's first autoencoder do."""

    def __init__(self, inner: torch.nn.Module, spoilt: float) -> None:
        super().__init__()
        self.inner = inner
        self.spoilt = spoilt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        painted: torch.Tensor = self.inner(x)
        return torch.full_like(painted, self.spoilt) if x.dtype == torch.bfloat16 else painted


@pytest.fixture
def half(stock: StableDiffusionXLPipeline) -> Iterator[AutoencoderKL]:
    """The demo's autoencoder in bfloat16, in a pipeline of float32."""
    vae = AutoencoderKL.from_config(stock.vae.config)
    vae.load_state_dict(stock.vae.state_dict())
    return vae.to(torch.bfloat16).eval()


def family_with(stock: StableDiffusionXLPipeline, vae: Any) -> SdxlFamily:
    return SdxlFamily(StableDiffusionXLPipeline(**{**stock.components, "vae": vae}))


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -1.0], ids=["nan", "infinity", "black"])
def test_a_spoilt_picture_is_decoded_once_more_in_float32_and_counted(
    stock: StableDiffusionXLPipeline, family: SdxlFamily, half: AutoencoderKL, spoilt: float
) -> None:
    half.decoder.conv_out = Overflowing(half.decoder.conv_out, spoilt)
    spoiling = family_with(stock, half)
    common: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 4, **SMALL}
    painted = ours(spoiling, **common)
    assert spoiling.decode_retries == 1
    # The weights went through bfloat16 once, so the pictures are alike and not equal.
    assert np.abs(painted.astype(int) - ours(family, **common)).mean() < 5
    assert half.dtype == torch.bfloat16, "the shared autoencoder keeps the format that it was loaded in"


def test_of_pictures_that_are_decoded_together_each_counts(half: AutoencoderKL, family: SdxlFamily) -> None:
    half.decoder.conv_out = Overflowing(half.decoder.conv_out, float("nan"))
    vae = Vae(half, family._pipeline.image_processor)
    with torch.inference_mode():
        assert len(vae.decode(torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)))) == 3
    assert vae.retries == 3


def test_what_float32_cannot_save_is_an_error(stock: StableDiffusionXLPipeline, half: AutoencoderKL) -> None:
    torch.nn.init.constant_(half.decoder.conv_out.bias, float("nan"))
    spoilt = family_with(stock, half)
    with pytest.raises(GenerationFailed, match="black or as numbers that are not finite, in float32 too"):
        ours(spoilt, prompt=PROMPT, seed=1, num_inference_steps=1, **SMALL)


def test_a_black_picture_that_was_meant_is_a_picture(stock: StableDiffusionXLPipeline, family: SdxlFamily) -> None:
    black = AutoencoderKL.from_config(stock.vae.config)
    torch.nn.init.zeros_(black.decoder.conv_out.weight)
    torch.nn.init.constant_(black.decoder.conv_out.bias, -1.0)
    pixels = Vae(black.eval(), stock.image_processor).decode(torch.zeros(1, 4, 8, 8))
    assert not pixels.any()


def halved(stock: StableDiffusionXLPipeline) -> dict[str, Any]:
    """Components of the demo in bfloat16, with an autoencoder that encodes in float32, as SDXL's own does."""
    modules = {name: part for name, part in stock.components.items() if isinstance(part, torch.nn.Module)}
    half: dict[str, Any] = {name: copy.deepcopy(module).to(torch.bfloat16) for name, module in modules.items()}
    half["vae"].register_to_config(force_upcast=True)
    return {**stock.components, **half}


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (StableDiffusionXLPipeline, {"guidance_scale": 7.3, **SMALL}),
        (StableDiffusionXLPipeline, {"guidance_scale": 3.3, "guidance_rescale": 0.7, **SMALL}),
        (StableDiffusionXLImg2ImgPipeline, {"image": picture(), "strength": 0.5}),
        (StableDiffusionXLInpaintPipeline, {"image": picture(), "mask_image": mask(), "strength": 0.9, **SMALL}),
    ],
    ids=["guidance", "rescale", "image-to-image", "inpainting"],
)
def test_in_half_precision_too_pictures_are_those_of_the_stock_call(
    stock: StableDiffusionXLPipeline, kind: Any, parameters: dict[str, Any]
) -> None:
    components = halved(stock)
    pipeline = kind(**components)
    pipeline.set_progress_bar_config(disable=True)
    common = {"prompt": PROMPT, "num_inference_steps": 6, **parameters}
    family = SdxlFamily(StableDiffusionXLPipeline(**components))
    assert np.array_equal(ours(family, seed=1, **common), theirs(pipeline, 1, **common))
    assert components["vae"].dtype == torch.bfloat16


def test_a_half_precision_pipeline_paints_nearly_the_same(stock: StableDiffusionXLPipeline, family: SdxlFamily) -> None:
    low = SdxlFamily(StableDiffusionXLPipeline(**halved(stock)))
    common: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 6, **SMALL}
    request = low.resolve(GenerateRequest(**common))
    job = low.begin(request, low.encode(request))
    assert job.latents.dtype == torch.bfloat16
    assert np.abs(ours(low, **common).astype(int) - ours(family, **common)).mean() < 12


def test_tiles_paint_the_same_picture_within_a_seam(family: SdxlFamily) -> None:
    request = family.resolve(GenerateRequest(prompt=PROMPT, seed=1, num_inference_steps=2, height=256, width=256))
    job = family.begin(request, family.encode(request))
    while not job.done:
        family.step([job])
    whole, tiled = family.decode([job])[0], family.decode([job], tiled=True)[0]
    assert whole.shape == tiled.shape
    assert np.abs(whole.astype(int) - tiled).mean() < 12
    assert np.array_equal(family.decode([job])[0], whole), "tiling was switched off again"
