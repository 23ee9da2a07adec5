"""What the models are shown: captioned drawings, as pixels or encoded once as latents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from app.demo.shapes import PICTURE_SIZE, Drawing, draw, random_drawing
from app.demo.training.vocabulary import LOOSE_WORDS

OTHER_SIZES = ((96, 96), (96, 160), (160, 96), (192, 192))
"""Heights and widths that one batch in seven has, so that the models also know other sizes than their own."""


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """float32 ``[n, 3, h, w]`` in -1…1."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def random_pictures(rng: random.Random) -> torch.Tensor:
    """Eight pictures of one size, ``[8, 3, h, w]``."""
    height, width = (PICTURE_SIZE, PICTURE_SIZE) if rng.random() < 6 / 7 else rng.choice(OTHER_SIZES)
    return to_tensor([draw(random_drawing(rng), width, height, rng) for _ in range(8)])


def caption(drawing: Drawing, rng: random.Random) -> str:
    """Mostly the canonical sentence; sometimes nothing, sometimes how people really write."""
    dice = rng.random()
    if dice < 0.82:
        return drawing.caption
    if dice < 0.85:
        return ""
    words = [drawing.size, drawing.colour, drawing.shape]
    if rng.random() < 0.7:
        words += rng.choice((["on"], ["with", "a"], ["in", "front", "of", "a"], ["on", "the"], ["and"]))
        words += [drawing.background, rng.choice(("background", ""))]
    if rng.random() < 0.5:
        stray = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6)))
        words = [rng.choice((*LOOSE_WORDS, stray)), rng.choice(("of", "a", "")), *words]
    return " ".join(filter(None, words))


class Latents:
    """Pictures encoded once, to draw batches from.

    Args:
        vae: trained.
        native: pictures of the usual size; of every other size there is a twelfth.
        small: share of them made small whatever the dice said.
        seed: of the drawings.
    """

    def __init__(self, vae: AutoencoderKL, native: int, small: float, seed: int) -> None:
        rng = random.Random(seed)
        self.sizes = {(PICTURE_SIZE, PICTURE_SIZE): native, **dict.fromkeys(OTHER_SIZES, native // 12)}
        self.drawings: dict[tuple[int, int], list[Drawing]] = {}
        self.latents: dict[tuple[int, int], torch.Tensor] = {}
        for (height, width), count in self.sizes.items():
            drawings = [random_drawing(rng) for _ in range(count)]
            drawings = [replace(each, size="small") if rng.random() < small else each for each in drawings]
            parts = []
            for start in tqdm(range(0, count, 32), desc=f"encoding {height} x {width}"):
                part = [draw(drawing, width, height, rng) for drawing in drawings[start : start + 32]]
                with torch.no_grad():
                    parts.append(vae.encode(to_tensor(part)).latent_dist.mean)
            self.drawings[height, width] = drawings
            self.latents[height, width] = torch.cat(parts) * vae.config.scaling_factor

    def batch(self, size: int, rng: random.Random) -> tuple[tuple[int, int], torch.Tensor, list[Drawing]]:
        """Height and width in pixels, latents ``[size, 4, height / 8, width / 8]``, and what they show."""
        native, *others = self.sizes
        shape = native if rng.random() < 6 / 7 else rng.choice(others)
        picks = [rng.randrange(len(self.drawings[shape])) for _ in range(size)]
        return shape, self.latents[shape][picks], [self.drawings[shape][i] for i in picks]
