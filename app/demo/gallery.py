"""The README's picture: ``python -m app.demo.gallery`` asks the demo models for captions and puts them side by side.

The first two rows are by the SDXL, the third by the FLUX.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from PIL import Image

from app.demo.shapes import PICTURE_SIZE, Drawing
from app.demo.train import WEIGHTS

PICTURE = Path(__file__).parent / "gallery.png"
COLUMNS = 6
GAP = 4
DRAWINGS = (
    Drawing("red", "circle", "white"),
    Drawing("yellow", "star", "blue", "large"),
    Drawing("green", "triangle", "black"),
    Drawing("purple", "ring", "yellow", "large"),
    Drawing("white", "cross", "red"),
    Drawing("orange", "square", "purple", "small"),
    Drawing("blue", "ring", "orange"),
    Drawing("black", "star", "white", "small"),
    Drawing("yellow", "cross", "green", "large"),
    Drawing("white", "circle", "black", "small"),
    Drawing("red", "triangle", "yellow", "large"),
    Drawing("purple", "square", "white"),
)
FLUX_DRAWINGS = (
    Drawing("blue", "star", "yellow"),
    Drawing("white", "ring", "purple"),
    Drawing("green", "circle", "orange", "large"),
    Drawing("red", "cross", "black"),
    Drawing("black", "triangle", "green"),
    Drawing("orange", "square", "blue", "large"),
)


def main() -> None:
    sdxl = StableDiffusionXLPipeline.from_pretrained(WEIGHTS / "sdxl", dtype=torch.float32)
    flux = FluxPipeline.from_pretrained(WEIGHTS / "flux", dtype=torch.float32)
    pictures = [
        *_paint(sdxl, DRAWINGS, num_inference_steps=20),
        *_paint(flux, FLUX_DRAWINGS, num_inference_steps=8, height=PICTURE_SIZE, width=PICTURE_SIZE),
    ]
    cell = PICTURE_SIZE + GAP
    grid = Image.new("RGB", (COLUMNS * cell - GAP, len(pictures) // COLUMNS * cell - GAP), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % COLUMNS * cell, i // COLUMNS * cell))
    grid.save(PICTURE, optimize=True)


def _paint(pipeline: Any, drawings: Sequence[Drawing], **how: int) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(drawings))]
    pictures: list[Image.Image] = pipeline(
        prompt=[drawing.caption for drawing in drawings], generator=generators, **how
    ).images
    return pictures


if __name__ == "__main__":
    main()
