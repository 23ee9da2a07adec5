"""SDXL's base: two text encoders and a UNet, trained together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from app.demo.shapes import PICTURE_SIZE
from app.demo.training.autoencoder import LATENT_FACTOR
from app.demo.training.fitting import adam, fit
from app.demo.training.pictures import Latents, caption
from app.demo.training.results import Paint, look
from app.demo.training.vocabulary import END_PADS, make_clip_tokenizer

TIME_ID_WIDTH = 8
"""Numbers that each size, crop and score is spread over, for the UNet to read."""


def make_text_encoder(
    tokenizer: CLIPTokenizer, *, layers: int, projection: bool
) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=64,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def make_unet(cross_attention_dim: int, time_ids: int) -> UNet2DConditionModel:
    """A UNet that reads `time_ids` numbers beside the pooled caption: six for the base, five for the refiner."""
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // LATENT_FACTOR,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=64 + time_ids * TIME_ID_WIDTH,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


class Base(torch.nn.Module):
    """What is trained together: both text encoders and the UNet."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.text_encoder = make_text_encoder(tokenizers[0], layers=3, projection=False)
        self.text_encoder_2 = make_text_encoder(tokenizers[1], layers=3, projection=True)
        self.unet = make_unet(cross_attention_dim=128, time_ids=6)

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """As the SDXL pipeline does: both encoders' last hidden layer but one, and the second's projection."""
        hidden = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, (self.text_encoder, self.text_encoder_2), strict=True):
            ids = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            output = encoder(ids.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(hidden, dim=-1), pooled


def time_ids(height: int, width: int, rows: int, rng: random.Random) -> torch.Tensor:
    """Original size, crop and target size; now and then arbitrary ones, so that any value is served gracefully."""
    usual = [height, width, 0, 0, height, width]
    return torch.tensor(
        [usual if rng.random() < 0.9 else [rng.randrange(0, 1025) for _ in usual] for _ in range(rows)],
        dtype=torch.float32,
    )


def make_base(folder: Path, seed: int) -> Base:
    """Untrained, with its tokenizers' files written to `folder`."""
    torch.manual_seed(seed)
    return Base((make_clip_tokenizer(folder / "tokenizer", END_PADS), make_clip_tokenizer(folder / "tokenizer_2", "!")))


def load_base(pipeline: StableDiffusionXLPipeline, seed: int) -> Base:
    """As trained before."""
    torch.manual_seed(seed)
    base = Base((pipeline.tokenizer, pipeline.tokenizer_2))
    base.text_encoder, base.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
    base.unet = pipeline.unet
    return base.train().requires_grad_(True)


def train_base(
    model: Base, vae: AutoencoderKL, folder: Path, *, steps: int, peak: float, native: int, small: float, seed: int
) -> StableDiffusionXLPipeline:
    """Noise prediction on latents; one caption in ten is dropped so that guidance has something to steer from.

    Args:
        model: what is trained.
        vae: trained; stays as it is.
        folder: a grid of pictures is laid beside it now and then.
        steps: batches.
        peak: largest learning rate.
        native: pictures of the usual size.
        small: share of them made small whatever the dice said.
        seed: of everything random but the first weights.
    """
    rng = random.Random(seed)
    data = Latents(vae, native, small, seed)
    noise_scheduler = DDPMScheduler.from_config(make_scheduler().config)

    def pipeline(model: Base) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=model.text_encoder,
            text_encoder_2=model.text_encoder_2,
            tokenizer=model.tokenizers[0],
            tokenizer_2=model.tokenizers[1],
            unet=model.unet,
            scheduler=make_scheduler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )

    def loss_of_batch() -> torch.Tensor:
        (height, width), latents, drawings = data.batch(48, rng)
        embeddings, pooled = model.encode([caption(drawing, rng) for drawing in drawings])
        kept = torch.tensor([rng.random() > 0.07 for _ in drawings]).float()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(drawings),))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        conditions = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids(height, width, len(drawings), rng)}
        predicted = model.unet(
            noisy, timesteps, embeddings * kept[:, None, None], added_cond_kwargs=conditions, return_dict=False
        )[0]
        loss: torch.Tensor = F.mse_loss(predicted, noise)
        return loss

    def now_and_then(step: int, best: Base) -> None:
        if step and step % 1500 == 0:
            grid = folder.with_name(f"{folder.name}-grid.png")
            tqdm.write(f"step {step}: {look(painter(pipeline(best)), grid, 24)}")

    best = fit(
        model,
        loss_of_batch,
        adam(model, peak, weight_decay=1e-3),
        name="base",
        steps=steps,
        average=0.999,
        after=now_and_then,
    )
    return pipeline(best)


def painter(pipeline: StableDiffusionXLPipeline, steps: int = 20) -> Paint:
    """The base alone."""
    pipeline.set_progress_bar_config(disable=True)

    def paint(prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        output: Any = pipeline(prompt=prompts, num_inference_steps=steps, generator=generators)
        pictures: list[Image.Image] = output.images
        return pictures

    return paint
