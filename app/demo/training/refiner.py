"""SDXL's refiner: a UNet that finishes what the base began, with the base's second text encoder and autoencoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tqdm import tqdm

from app.demo.training.base import TIME_ID_WIDTH, make_scheduler, make_unet
from app.demo.training.fitting import adam, fit
from app.demo.training.pictures import Latents, caption
from app.demo.training.results import Paint, look

SHARED_PARTS = ("text_encoder_2", "tokenizer_2", "vae")
"""What base and refiner have in common, so that a server needs it in memory once."""
GOOD, BAD = 6.0, 2.5
"""Aesthetic scores: the pipeline's own defaults for the prompt and for the negative prompt."""
LATE, LATE_SHARE = 400, 0.7
"""The refiner mostly works at the end of a generation: this share of its practice is at timesteps below `LATE`."""


def make_refiner_unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet for one text encoder and five time ids, with the base's weights wherever they mean the same.

    The base's cross-attention reads both text encoders side by side, of which the second stays; and its pooled
    caption is followed by six time ids, of which the first four (original size and crop) stay.
    """
    unet = make_unet(cross_attention_dim=64, time_ids=5)
    weights = unet.state_dict()
    shared = 64 + 4 * TIME_ID_WIDTH
    for name, weight in base.state_dict().items():
        if weight.shape == weights[name].shape:
            weights[name] = weight.clone()
        elif name == "add_embedding.linear_1.weight":
            weights[name][:, :shared] = weight[:, :shared]
        else:
            weights[name] = weight[:, 64:].clone()
    unet.load_state_dict(weights)
    return unet


def time_ids(height: int, width: int, kept: Sequence[bool], rng: random.Random) -> torch.Tensor:
    """Original size, crop and aesthetic score; now and then arbitrary ones, so that any value is served gracefully."""
    rows = []
    for keep in kept:
        if rng.random() < 0.9:
            rows.append([height, width, 0, 0, rng.gauss(GOOD, 0.5) if keep else BAD])
        else:
            rows.append([*(rng.randrange(0, 1025) for _ in range(4)), rng.uniform(1, 10)])
    return torch.tensor(rows, dtype=torch.float32)


def timesteps(rows: int) -> torch.Tensor:
    """Mostly late ones, but every one now and then: a base may hand over early."""
    late = torch.rand(rows) < LATE_SHARE
    return torch.where(late, torch.randint(0, LATE, (rows,)), torch.randint(0, 1000, (rows,)))


def train_refiner(
    base: StableDiffusionXLPipeline, folder: Path, *, steps: int, native: int, seed: int
) -> StableDiffusionXLImg2ImgPipeline:
    """Noise prediction as the base learns it; the text encoder is the base's and stays as it is.

    Args:
        base: trained.
        folder: a grid of pictures is laid beside it now and then.
        steps: batches.
        native: pictures of the usual size.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = Latents(base.vae, native, small=0.2, seed=seed)
    noise_scheduler = DDPMScheduler.from_config(make_scheduler().config)
    unet = make_refiner_unet(base.unet).train()

    def pipeline(unet: UNet2DConditionModel) -> StableDiffusionXLImg2ImgPipeline:
        return StableDiffusionXLImg2ImgPipeline(
            vae=base.vae,
            text_encoder=None,
            text_encoder_2=base.text_encoder_2,
            tokenizer=None,
            tokenizer_2=base.tokenizer_2,
            unet=unet,
            scheduler=make_scheduler(),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = base.tokenizer_2(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        output = base.text_encoder_2(ids.input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def loss_of_batch() -> torch.Tensor:
        (height, width), latents, drawings = data.batch(48, rng)
        kept = [rng.random() > 0.07 for _ in drawings]
        # Unlike the base, the refiner's pipeline encodes an empty caption.
        captions = [caption(drawing, rng) if keep else "" for drawing, keep in zip(drawings, kept, strict=True)]
        embeddings, pooled = encode(captions)
        noise = torch.randn_like(latents)
        moments = timesteps(len(drawings))
        noisy = noise_scheduler.add_noise(latents, noise, moments)
        conditions = {"text_embeds": pooled, "time_ids": time_ids(height, width, kept, rng)}
        predicted = unet(noisy, moments, embeddings, added_cond_kwargs=conditions, return_dict=False)[0]
        loss: torch.Tensor = F.mse_loss(predicted, noise)
        return loss

    def now_and_then(step: int, best: UNet2DConditionModel) -> None:
        if step and step % 500 == 0:
            grid = folder.with_name(f"{folder.name}-grid.png")
            tqdm.write(f"step {step}: {look(painter(base, pipeline(best)), grid, 24)}")

    best = fit(
        unet,
        loss_of_batch,
        adam(unet, peak=7e-4, weight_decay=1e-3),
        name="refiner",
        steps=steps,
        average=0.998,
        after=now_and_then,
    )
    return pipeline(best)


def painter(
    base: StableDiffusionXLPipeline, refiner: StableDiffusionXLImg2ImgPipeline, limit: float = 0.8, steps: int = 20
) -> Paint:
    """The ensemble of experts: the base hands over to the refiner at the fraction `limit` of the way."""
    base.set_progress_bar_config(disable=True)
    refiner.set_progress_bar_config(disable=True)

    def paint(prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        shared = {"prompt": prompts, "num_inference_steps": steps, "generator": generators}
        begun: Any = base(**shared, denoising_end=limit, output_type="latent")
        done: Any = refiner(**shared, denoising_start=limit, image=begun.images)
        pictures: list[Image.Image] = done.images
        return pictures

    return paint
