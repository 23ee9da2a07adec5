"""What one SDXL image is on its way: the parts that it goes through, and what it carries. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from app.engine import schedulers
from app.engine.adapters import Loras
from app.engine.family import Job
from app.engine.prompts import Embedding, PromptEncoder
from app.engine.vae import Vae


class Part:
    """A UNet with everything that belongs to it: the base, or the refiner.

    Args:
        name: ``base`` or ``refiner``.
        pipeline: loaded, on its device.
        device: where its UNet runs.
        vae: of the other part, where it is the same.
    """

    def __init__(self, name: str, pipeline: Any, device: torch.device, vae: Vae | None = None) -> None:
        self.name = name
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.schedulers = schedulers.Schedulers(pipeline.scheduler)
        self.prompts = PromptEncoder(pipeline, device)
        shared = vae is not None and vae.module is pipeline.vae
        self.vae = vae if vae is not None and shared else Vae(pipeline.vae, pipeline.image_processor)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Embeddings of the positive and, with guidance, of the negative prompt, by name of the part."""

    positive: dict[str, Embedding]
    negative: dict[str, Embedding]


@dataclass(slots=True, kw_only=True)
class Leg:
    """One image's way through one part.

    Attributes:
        scheduler: its own.
        scheduler_timesteps: ``[steps]`` as the scheduler made them.
        timesteps: float32 ``[steps]`` on the device, so that no step waits for it.
        first_timestep: ``[1]``, where the way begins, also where it ends before its first step.
        embeddings: ``[rows, tokens, d]``; a guided job has two rows, the negative one first.
        pooled: ``[rows, d]``.
        time_ids: ``[rows, 6]``: original size, crop, target size; the refiner's ``[rows, 5]`` end with the score.
        timestep_cond: ``[1, d]``, for models that take the guidance scale as an input.
    """

    part: Part
    scheduler: Any
    scheduler_timesteps: torch.Tensor
    timesteps: torch.Tensor
    first_timestep: torch.Tensor
    step_options: dict[str, Any]
    embeddings: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    timestep_cond: torch.Tensor | None


@dataclass(slots=True)
class Inpainting:
    """What inpainting keeps beside the latents.

    Attributes:
        mask: ``[1, 1, h, w]``, 1 where to paint.
        image_latents: of the picture, ``[1, c, h, w]``.
        noise: that it is mixed with.
        masked_latents: of the picture without what is painted; only for UNets with nine channels.
    """

    mask: torch.Tensor
    image_latents: torch.Tensor
    noise: torch.Tensor
    masked_latents: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class SdxlJob(Job):
    """One image on its way through one part or two.

    Attributes:
        latents: ``[1, c, h / 8, w / 8]``.
        legs: through the base, the refiner, or both in this order.
        leg_index: where it is.
        leg_step: steps taken of that leg.
        guidance: ``[1, 1, 1, 1]``, float32 on the device.
        rescale: guidance rescale and 1 minus it, in the same shape.
    """

    latents: torch.Tensor
    generator: torch.Generator
    legs: list[Leg]
    leg_index: int = 0
    leg_step: int = 0
    guided: bool
    guidance: torch.Tensor
    rescale: tuple[torch.Tensor, torch.Tensor] | None
    inpainting: Inpainting | None
    loras: Loras = field(default=())

    @property
    def leg(self) -> Leg:
        return self.legs[min(self.leg_index, len(self.legs) - 1)]
