"""What the choices that cost a little of the picture cost: PSNR against the same pictures without them.

``make bench`` runs it and writes the table to ``tests/benchmarks/results/lossy.md``. Times nothing, and comes out the
same each time. Everything is computed in float32 on the CPU; what 8 bits are used for is in 8 bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
KINDS: Mapping[str, tuple[str, str, Any, Any]] = {
    "SDXL": ("sdxl", "unet", StableDiffusionXLPipeline, SdxlFamily),
    "FLUX": ("flux", "transformer", FluxPipeline, FluxFamily),
}
"""Each model's folder, the part whose weights may be held in 8 bits, and the classes of its pipeline and family."""
TRUE_CFG = {"true_cfg_scale": 2.0, "negative_prompt": "blue"}


def make(model: str, stored: bool = False, **optimization: Any) -> Family[Any]:
    """The demo's family.

    Args:
        model: one of `KINDS`.
        stored: hold the weights in 8 bits.
        optimization: fields of `Optimization`.
    """
    folder, part, pipeline_kind, family_kind = KINDS[model]
    pipeline = pipeline_kind.from_pretrained(DEMO_WEIGHTS / folder, dtype=torch.float32)
    if stored:
        store_as_fp8(getattr(pipeline, part), torch.float32)
    family: Family[Any] = family_kind(pipeline, optimization=Optimization(**optimization))
    return family


def paint(family: Family[Any], **asked: Any) -> list[np.ndarray]:
    return [
        ours(family, prompt=prompt, seed=seed, num_inference_steps=STEPS, **asked)
        for prompt in PROMPTS
        for seed in SEEDS
    ]


def measure() -> Iterator[tuple[str, str, list[np.ndarray], list[np.ndarray]]]:
    """Each model, each choice, and the pictures with it and in full."""
    for model in KINDS:
        off, allowing = make(model), make(model, level="max", backend="eager")
        full = paint(off)
        yield model, "matrix products in 8 bits, as with `max`", paint(make(model, level="safe", fp8=True)), full
        yield model, "`--quantization fp8`", paint(make(model, stored=True)), full
        guidance = TRUE_CFG if model == "FLUX" else {}
        guided = paint(off, **guidance) if guidance else full
        for end in (0.9, 0.75, 0.5, 0.25):
            yield model, f"`guidance_end` {end}", paint(allowing, **guidance, guidance_end=end), guided
        for every in (2, 3, 4) if model == "FLUX" else ():
            yield model, f"`--step_cache {every}`", paint(make(model, level="safe", step_cache=every)), full


def main() -> None:
    torch.set_num_threads(1)  # with another number a CPU rounds otherwise
    lines = ["| model | what | median, dB | least, dB |", "|---|---|--:|--:|"]
    for model, what, pictures, full in measure():
        found = [psnr(*pair) for pair in zip(pictures, full, strict=True)]
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
