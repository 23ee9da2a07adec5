"""What comes out of a training: a folder in diffusers' own layout, and a grid of pictures to look at."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from app.demo.shapes import PICTURE_SIZE, Drawing, judge, random_drawing

Paint: TypeAlias = Callable[[list[str], list[torch.Generator]], list[Image.Image]]
"""Prompts and as many generators to pictures of `PICTURE_SIZE`."""

COLUMNS = 12


def captions_for(count: int, seed: int) -> list[Drawing]:
    rng = random.Random(seed)
    return [random_drawing(rng) for _ in range(count)]


def look(paint: Paint, path: Path, count: int) -> str:
    """Paint `count` captions, save them as one grid, and say how many the judge agrees with."""
    drawings = captions_for(count, seed=7)
    pictures: list[Image.Image] = []
    for start in range(0, count, COLUMNS):
        part = drawings[start : start + COLUMNS]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures += paint([drawing.caption for drawing in part], generators)
    side = PICTURE_SIZE
    grid = Image.new("RGB", (COLUMNS * side, -(-count // COLUMNS) * side))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % COLUMNS * side, i // COLUMNS * side))
    grid.save(path)
    verdicts = [judge(picture) for picture in pictures]
    pairs = list(zip(verdicts, drawings, strict=True))
    colours = sum((v.colour, v.background) == (d.colour, d.background) for v, d in pairs)
    shapes = sum(v.shape == d.shape for v, d in pairs)
    return f"colours {colours}/{count}, shapes {shapes}/{count}"


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Half-precision files for the denoiser and the VAE; the text encoders are tiny and stay in float32."""
    halved = copy.copy(pipeline)
    large = {name: each for name in ("unet", "transformer", "vae") if (each := getattr(pipeline, name, None))}
    halved.register_modules(**{name: copy.deepcopy(each).half() for name, each in large.items()})
    for tokenizer in (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")):
        if tokenizer is not None:
            # The length of the last caption is no part of a tokenizer.
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
    halved.save_pretrained(folder, safe_serialization=True)
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        # Where it was loaded from is nobody's business.
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.glob("*/*.safetensors"):
        path.chmod(0o644)
