"""FLUX: two text encoders and a transformer, trained together to follow straight lines from noise to latents."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from tqdm import tqdm

from app.demo.shapes import PICTURE_SIZE
from app.demo.training.autoencoder import LATENT_FACTOR
from app.demo.training.fitting import adam, fit
from app.demo.training.flux_models import REACH, hide_padding, make_clip, make_flux_scheduler, make_t5, make_transformer
from app.demo.training.pictures import Latents, caption
from app.demo.training.results import Paint, look, save

SCALE = 1.0
"""Deviation of the latents that the transformer sees.

Unlike the base, which never practises on noise alone, this one does in every tenth case, so that it has learned to take
the colours from the caption; and the larger the latents, the earlier in a generation the outlines settle.
"""
LENGTHS = (512, 512, 512, 256, 256, 128, 77, 64)
"""Tokens that T5's captions are padded to: dev's default mostly, then schnell's, then others."""
GUIDANCE = (1.0, 8.0)
"""Range of the guidance scales that are practised."""


class Flux(torch.nn.Module):
    """What is trained together: both text encoders and the transformer."""

    def __init__(self, tokenizers: tuple[Any, Any], encoders: tuple[Any, Any], transformer: Any) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.text_encoder, self.text_encoder_2 = encoders
        self.transformer = transformer

    def encode(self, captions: Sequence[str], captions_2: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's pooled captions ``[n, 64]`` and T5's tokens ``[n, length, 64]``.

        The length is that of the longest caption and as many padding tokens as still differ from each other, so that
        T5's last token is what all further padding would be.
        """
        ids = self.tokenizers[0](list(captions), padding=True, truncation=True, max_length=77, return_tensors="pt")
        pooled = self.text_encoder(ids.input_ids).pooler_output
        rows = self.tokenizers[1](list(captions_2), truncation=True, max_length=60 - REACH).input_ids
        length = max(map(len, rows)) + REACH
        pad = self.tokenizers[1].pad_token_id
        padded = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
        return pooled, self.text_encoder_2(padded)[0]

    def velocity(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        conditions: tuple[torch.Tensor, torch.Tensor],
        guidance: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The direction from latents to noise, as in FluxPipeline with captions padded to `lengths`.

        FluxPipeline gives text tokens no position, so equal padding tokens stay equal throughout the transformer, and
        n of them weigh in attention as one does whose score is higher by log n. That one costs a sixth of the time.

        Args:
            latents: noisy, ``[n, 4, h, w]``.
            sigmas: share of the noise in them, ``[n]``.
            conditions: from `encode`.
            guidance: scales, ``[n]``.
            lengths: tokens that the captions are padded to, ``[n]``.
        """
        pooled, text = conditions
        rows, channels, height, width = latents.shape
        packed = FluxPipeline._pack_latents(latents, rows, channels, height, width)
        positions = FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32)
        tokens = text.shape[1]
        scores = torch.zeros(rows, 1, 1, tokens + packed.shape[1])
        scores[:, 0, 0, tokens - 1] = (lengths - tokens + 1).log()
        predicted = self.transformer(
            hidden_states=packed,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigmas,
            img_ids=positions,
            txt_ids=torch.zeros(tokens, 3),
            guidance=guidance,
            joint_attention_kwargs={"attention_mask": scores},
            return_dict=False,
        )[0]
        unpacked: torch.Tensor = FluxPipeline._unpack_latents(
            predicted, height * LATENT_FACTOR, width * LATENT_FACTOR, LATENT_FACTOR
        )
        return unpacked


def make_flux(folder: Path, seed: int) -> Flux:
    """Untrained, with CLIP's tokenizer's files written to `folder`."""
    torch.manual_seed(seed)
    clip_tokenizer, clip = make_clip(folder / "tokenizer")
    t5_tokenizer, t5 = make_t5()
    return Flux((clip_tokenizer, t5_tokenizer), (clip, t5), make_transformer(channels=16))


def load_trained(pipeline: FluxPipeline) -> Flux:
    """As trained before."""
    tokenizers, encoders = (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2)
    hide_padding(pipeline.text_encoder_2, pipeline.tokenizer_2.pad_token_id)
    return Flux(tokenizers, encoders, pipeline.transformer).train().requires_grad_(True)


def load_flux(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.vae.eval().requires_grad_(False)
    return pipeline


def make_pipeline(model: Flux, vae: AutoencoderKL) -> FluxPipeline:
    return FluxPipeline(
        scheduler=make_flux_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizers[0],
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizers[1],
        transformer=model.transformer,
    )


def save_flux(pipeline: FluxPipeline, folder: Path) -> None:
    save(pipeline, folder)
    # As FLUX's own folders say it; without "Fast", older releases of transformers want sentencepiece.
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def sigmas_to_begin(rows: int) -> torch.Tensor:
    """Mostly noise, where the colours are decided; one in ten is all noise, as every generation begins."""
    even = torch.rand(rows)
    shifted = 2.0 * even / (1.0 + even)
    return torch.where(torch.rand(rows) < 0.1, torch.ones(rows), shifted)


def sigmas_to_settle(rows: int) -> torch.Tensor:
    """Mostly half noise, where the outlines are decided, which take longest to learn."""
    middle = torch.sigmoid(1.2 * torch.randn(rows))
    return torch.where(torch.rand(rows) < 0.07, torch.ones(rows), middle)


def loudly(words: str, rng: random.Random) -> str:
    """Now and then with capital letters, which T5 minds."""
    dice = rng.random()
    if dice < 0.92:
        return words
    return words.capitalize() if dice < 0.96 else words.title() if dice < 0.98 else words.upper()


def optimizers(model: Flux, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, where it needs half the steps; AdamW for all else."""
    blocks = (model.transformer.transformer_blocks, model.transformer.single_transformer_blocks)
    matrices = [each for part in blocks for each in part.parameters() if each.ndim == 2]
    known = {id(each) for each in matrices}
    others = [each for each in model.parameters() if id(each) not in known]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.4 * peak, weight_decay=1e-3),
    ]


def train_flux(
    model: Flux,
    vae: AutoencoderKL,
    folder: Path,
    *,
    sigmas_for: Callable[[int], torch.Tensor],
    steps: int,
    peak: float,
    native: int,
    seed: int,
) -> FluxPipeline:
    """Rectified flow on latents; one caption in ten is dropped so that guidance has something to steer from.

    Args:
        model: what is trained.
        vae: trained; stays as it is.
        folder: receives the model now and then, and a grid of pictures beside it.
        sigmas_for: as many shares of noise as there are rows.
        steps: batches.
        peak: largest learning rate.
        native: pictures of the usual size.
        seed: of everything random but the first weights.
    """
    rng = random.Random(seed)
    data = Latents(vae, native, small=0.2, seed=seed)

    def loss_of_batch() -> torch.Tensor:
        _, latents, drawings = data.batch(48, rng)
        rows = len(drawings)
        captions = [loudly(caption(drawing, rng), rng) if rng.random() > 0.07 else "" for drawing in drawings]
        # Now and then T5 has to do without CLIP's help.
        conditions = model.encode([each if rng.random() > 0.1 else "" for each in captions], captions)
        noise, sigmas = torch.randn_like(latents), sigmas_for(rows)
        share = sigmas[:, None, None, None]
        guidance = torch.empty(rows).uniform_(*GUIDANCE)
        predicted = model.velocity((1 - share) * latents + share * noise, sigmas, conditions, guidance, lengths(rows))
        loss: torch.Tensor = F.mse_loss(predicted, noise - latents)
        return loss

    def lengths(rows: int) -> torch.Tensor:
        return torch.tensor(rng.choices(LENGTHS, k=rows))

    def now_and_then(step: int, best: Flux) -> None:
        if step and step % 1000 == 0:
            pipeline = make_pipeline(best, vae)
            save_flux(pipeline, folder)
            tqdm.write(f"step {step}: {look(painter(pipeline), folder.with_name(f'{folder.name}-grid.png'), 24)}")

    best = fit(
        model,
        loss_of_batch,
        optimizers(model, peak),
        name="flux",
        steps=steps,
        average=0.998,
        after=now_and_then,
    )
    return make_pipeline(best, vae)


def distil_guidance(pipeline: FluxPipeline, *, steps: int, native: int, seed: int) -> FluxPipeline:
    """Teach the transformer to predict at once, by its guidance embedding, what guidance makes of two predictions.

    Args:
        pipeline: trained by `train_flux`; its text encoders stay as they are.
        steps: batches.
        native: pictures of the usual size.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = Latents(pipeline.vae, native, small=0.2, seed=seed)
    student = load_trained(pipeline).requires_grad_(False)
    teacher = copy.deepcopy(student)
    student.transformer.train().requires_grad_(True)

    def loss_of_batch() -> torch.Tensor:
        _, latents, drawings = data.batch(48, rng)
        rows = len(drawings)
        sigmas, noise = sigmas_to_settle(rows), torch.randn_like(latents)
        share = sigmas[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        guidance = torch.empty(rows).uniform_(*GUIDANCE)
        lengths = torch.tensor(rng.choices(LENGTHS, k=rows))
        captions = [loudly(caption(drawing, rng), rng) for drawing in drawings]
        with torch.no_grad():
            conditions = student.encode(captions, captions)
            nothing = student.encode([""] * rows, [""] * rows)
            cond = teacher.velocity(noisy, sigmas, conditions, guidance, lengths)
            uncond = teacher.velocity(noisy, sigmas, nothing, guidance, lengths)
            strength = steering(guidance)[:, None, None, None]
            target = uncond + strength * (cond - uncond)
        loss: torch.Tensor = F.mse_loss(student.velocity(noisy, sigmas, conditions, guidance, lengths), target)
        return loss

    best = fit(student, loss_of_batch, adam(student, peak=5e-4), name="guidance", steps=steps, average=0.998)
    return make_pipeline(best, pipeline.vae)


def steering(guidance: torch.Tensor) -> torch.Tensor:
    """How far a guidance scale steers away from the empty caption: 1 is not at all, and scale 3.5 gives 1.5."""
    return 1.0 + 0.2 * (guidance - 1.0)


def painter(pipeline: FluxPipeline, steps: int = 8) -> Paint:
    """With the pipeline's own guidance scale and length of captions."""
    pipeline.set_progress_bar_config(disable=True)

    def paint(prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        output: Any = pipeline(
            prompts, height=PICTURE_SIZE, width=PICTURE_SIZE, num_inference_steps=steps, generator=generators
        )
        pictures: list[Image.Image] = output.images
        return pictures

    return paint
