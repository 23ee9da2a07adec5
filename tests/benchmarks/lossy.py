"""What the choices that cost a little of the picture cost: PSNR against the same pictures without them.

``make bench`` runs it and writes the table to ``tests/benchmarks/results/lossy.md``. Times nothing, and comes out the
same each time. Everything is computed in float32 on the CPU; what 8 bits are used for is in 8 bits.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline

from app.engine.family import Family
from app.engine.flux import FluxFamily
from app.engine.optimization import Optimization
from app.engine.placement import store_as_fp8
from app.engine.sdxl import SdxlFamily
from app.engine.weights import DEMO_WEIGHTS
from tests.integration.stock import ours, psnr

RESULTS = Path(__file__).parent / "results" / "lossy.md"
PROMPTS = (
    "a red circle on a white background",
    "a small blue star on a yellow background",
    "two green squares on a black background",
    "a large yellow triangle on a blue background",
)
SEEDS = (1, 2)
STEPS = 20
TRUE_CFG = {"true_cfg_scale": 2.0, "negative_prompt": "blue"}


def sdxl(optimization: Optimization | None = None, stored: bool = False) -> Family[Any]:
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)
    if stored:
        store_as_fp8(pipeline.unet, torch.float32)
    return SdxlFamily(pipeline, optimization=optimization or Optimization())


def flux(optimization: Optimization | None = None, stored: bool = False) -> Family[Any]:
    pipeline = FluxPipeline.from_pretrained(DEMO_WEIGHTS / "flux", dtype=torch.float32)
    if stored:
        store_as_fp8(pipeline.transformer, torch.float32)
    return FluxFamily(pipeline, optimization=optimization or Optimization())


def paint(family: Family[Any], **asked: Any) -> list[Any]:
    return [
        ours(family, prompt=prompt, seed=seed, num_inference_steps=STEPS, **asked)
        for prompt in PROMPTS
        for seed in SEEDS
    ]


def measure() -> Iterator[tuple[str, str, list[float]]]:
    """Each model, each choice, and the PSNR of each picture."""
    for model, make, guided in (("SDXL", sdxl, {}), ("FLUX", flux, TRUE_CFG)):
        full = functools.cache(lambda make=make, **asked: paint(make(), **asked))

        def against(found: list[Any], full: Any = full, **asked: Any) -> list[float]:
            return [psnr(*pair) for pair in zip(found, full(**asked), strict=True)]

        in_8_bits = make(Optimization("safe", fp8=True))
        yield model, "matrix products in 8 bits, as with `max`", against(paint(in_8_bits))
        yield model, "`--quantization fp8`", against(paint(make(stored=True)))
        allowing = make(Optimization("max", backend="eager"))
        for end in (0.9, 0.75, 0.5, 0.25):
            found = paint(allowing, **guided, guidance_end=end)
            yield model, f"`guidance_end` {end}", against(found, **guided)
        if model == "FLUX":
            for every in (2, 3, 4):
                found = paint(make(Optimization("safe", step_cache=every)))
                yield model, f"`--step_cache {every}`", against(found)


def main() -> None:
    torch.set_num_threads(1)  # with another number a CPU rounds otherwise
    lines = ["| model | what | median, dB | least, dB |", "|---|---|--:|--:|"]
    for model, what, found in measure():
        lines.append(f"| {model} | {what} | {statistics.median(found):.1f} | {min(found):.1f} |")
        print(lines[-1], flush=True)
    note = (
        f"PSNR of {len(PROMPTS) * len(SEEDS)} pictures of {STEPS} steps against the same in full, demo models; from "
        "about 40 dB on they look the same. FLUX's guidance that ends is a `true_cfg_scale` of "
        f"{TRUE_CFG['true_cfg_scale']:g}."
    )
    RESULTS.write_text("\n".join([note, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
