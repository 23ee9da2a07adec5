"""The README's picture: ``python -m app.demo.gallery`` asks the demo for twelve captions and puts them side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
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


def main() -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(WEIGHTS / "sdxl", dtype=torch.float32)
    pictures = pipeline(
        prompt=[drawing.caption for drawing in DRAWINGS],
        num_inference_steps=20,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(DRAWINGS))],
    ).images
    cell = PICTURE_SIZE + GAP
    grid = Image.new("RGB", (COLUMNS * cell - GAP, len(DRAWINGS) // COLUMNS * cell - GAP), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % COLUMNS * cell, i // COLUMNS * cell))
    grid.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
