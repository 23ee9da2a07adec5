"""The demo refiner, loaded and called by stock diffusers alone: it finishes what the demo base began."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from app.demo.shapes import judge, random_drawing

WEIGHTS = Path("app/demo/weights")
STEPS = 20


@pytest.fixture(scope="module")
def base() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(WEIGHTS / "sdxl", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def refiner() -> StableDiffusionXLImg2ImgPipeline:
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(WEIGHTS / "refiner", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "vae"])
def test_what_base_and_refiner_share_is_the_same_in_every_byte(part: str) -> None:
    folders = [WEIGHTS / model / part for model in ("sdxl", "refiner")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_it_has_one_text_encoder_and_wants_an_aesthetic_score(refiner: StableDiffusionXLImg2ImgPipeline) -> None:
    assert refiner.text_encoder is None
    assert refiner.tokenizer is None
    assert refiner.config.requires_aesthetics_score
    assert not refiner.config.force_zeros_for_empty_prompt


@pytest.mark.parametrize(("limit", "count"), [(0.8, 48), (0.3, 24), (0.5, 24), (0.9, 24)])
def test_the_ensemble_paints_what_it_is_told(
    base: StableDiffusionXLPipeline, refiner: StableDiffusionXLImg2ImgPipeline, limit: float, count: int
) -> None:
    rng = random.Random(20_26)
    drawings = [random_drawing(rng) for _ in range(count)]
    right_colours = right_shapes = 0
    for start in range(0, count, 24):
        part = drawings[start : start + 24]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        shared = {"prompt": [d.caption for d in part], "num_inference_steps": STEPS, "generator": generators}
        begun = base(**shared, denoising_end=limit, output_type="latent").images
        for drawing, picture in zip(part, refiner(**shared, denoising_start=limit, image=begun).images, strict=True):
            verdict = judge(picture)
            right_colours += (verdict.colour, verdict.background) == (drawing.colour, drawing.background)
            right_shapes += verdict.shape == drawing.shape
    assert right_colours >= 0.95 * count
    assert right_shapes >= 0.92 * count
